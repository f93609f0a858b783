"""P-Tuning v2 in the form published with ChatGLM: `pre_seq_len` in the configuration, a `prefix_encoder` in the model.

It is not PEFT's PREFIX_TUNING: positions count from the first token of the text, not of the prefix. What is saved is
model.safetensors with the weights of transformer.prefix_encoder alone, beside the config.json that asks for them.
"""

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import adapters


logger = logging.getLogger("run_chatglm_lora.prefix_tuning")


def with_prefix(config, lora_args):
    """The configuration with the prefix of --pre_seq_len, or of the one saved in --adapter_name_or_path, if any."""
    saved = Path(lora_args.adapter_name_or_path or "", "config.json")
    if lora_args.adapter_name_or_path and lora_args.pre_seq_len is None and saved.exists():
        tuned = json.loads(saved.read_text(encoding="utf-8"))
        lora_args.pre_seq_len = tuned.get("pre_seq_len")
        lora_args.prefix_projection = tuned.get("prefix_projection", False)
    if lora_args.pre_seq_len is None:
        return config
    if config.model_type != "chatglm":
        raise ValueError("--pre_seq_len is ChatGLM's own prefix: for other models take --peft_type PREFIX_TUNING.")
    config.pre_seq_len, config.prefix_projection = lora_args.pre_seq_len, lora_args.prefix_projection
    return config


def prefix_tuned(model, lora_args):
    """The model, of which the prefix encoder alone is trained, in float32, and saved."""
    encoder = model.transformer.prefix_encoder.float()  # its states are cast to the type of the base
    if lora_args.adapter_name_or_path:
        adapters.check_base(lora_args.adapter_name_or_path, model)
        load_prefix(encoder, Path(lora_args.adapter_name_or_path))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model._keys_to_ignore_on_save = set(model.state_dict()) - trained
    count = sum(parameter.numel() for parameter in encoder.parameters())
    logger.info(f"Trainable parameters: {count:,}, a prefix of {lora_args.pre_seq_len} states for each layer")
    return model


def load_prefix(encoder: torch.nn.Module, folder: Path):
    """Load the prefix saved in a folder; ValueError if there is none, or one of another size."""
    path, start = folder / "model.safetensors", "transformer.prefix_encoder."
    saved = load_file(path) if path.exists() else {}
    weights = {name.removeprefix(start): tensor for name, tensor in saved.items() if name.startswith(start)}
    if not weights:
        raise ValueError(f"--adapter_name_or_path {folder}: there is no model.safetensors with a prefix encoder.")
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in weights.items()}:
        raise ValueError(f"--adapter_name_or_path {folder}: its prefix is not that of --pre_seq_len and this model.")
    encoder.load_state_dict(weights)
