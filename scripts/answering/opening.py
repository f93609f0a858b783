"""Model and tokenizer of a folder or hub name, be it of a model or of an adapter with its base."""

import importlib.util

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

import chatglm  # noqa: F401 - makes ChatGLM known
from finetuning.adapters import adapter_config, adapter_folder, base_of, opened_adapter
from finetuning.mistakes import named
from finetuning.prediction import with_cache_for_peft
from run_chatglm_lora import ModelArguments, hub_options, loaded_config, loaded_tokenizer, model_class


def opened_base(
    arguments: ModelArguments, dtype: str | None = None, device: str = "cpu", bits: int | None = None
) -> torch.nn.Module:
    """A model without adapter; `dtype` is a name of torch's (None: as stored), `bits` 4 or 8 quantises it."""
    config = loaded_config(arguments)
    options = {"dtype": getattr(torch, dtype) if dtype else "auto", "device_map": {"": device}}
    if bits:
        if not importlib.util.find_spec("bitsandbytes"):
            raise ValueError(f"--load_in_{bits}bit needs bitsandbytes: pip install bitsandbytes")
        quantization = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8, "bnb_4bit_quant_type": "nf4"}
        options["quantization_config"] = BitsAndBytesConfig(**quantization, bnb_4bit_compute_dtype=torch.bfloat16)
    name = arguments.model_name_or_path
    with named(f"The weights of {name} cannot be loaded", OSError, SafetensorError):
        return model_class(config).from_pretrained(name, config=config, **options, **hub_options(arguments)).eval()


def opened(
    name: str, base_model: str | None = None, trust_remote_code: bool = False, **loading
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Model, ready for inference, and tokenizer of a model folder, an adapter folder or a hub name of either.

    The base of an adapter is `base_model`, or the one that it was trained on; `loading` goes to `opened_base`. Raises
    ValueError or OSError where something is missing or does not fit.
    """
    folder = adapter_folder(name)
    if folder:
        adapter_config(folder)  # which also looks whether the weights are whole
    elif base_model:
        raise ValueError(f"{name} is no adapter (it has no adapter_config.json): --base_model is for adapters.")
    base, revision = base_of(folder, base_model) if folder else (name, "main")
    arguments = ModelArguments(base, model_revision=revision, trust_remote_code=trust_remote_code)
    model = opened_base(arguments, **loading)
    tokenizer = loaded_tokenizer(arguments, folder and str(folder))
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # as in training
    if folder:
        model = with_cache_for_peft(opened_adapter(model, str(folder), is_trainable=False))
    return model.eval(), tokenizer
