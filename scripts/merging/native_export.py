"""A merged model, or an adapter alone, in the layout of transformers' own GlmForCausalLM: for merge_lora.py."""

import copy
import json
from pathlib import Path

import peft
from safetensors.torch import save_file

from chatglm.native import native_tensors, native_tokenizer
from finetuning.adapters import KEEP_THE_BASE

from .weights import Merge


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_native(merge: Merge, folder: Path, end: list[int]):
    rope = merge.native.rope_parameters
    config = {
        **merge.native.to_dict(),
        "eos_token_id": end,
        "dtype": str(merge.outline(merge.base.names[0]).dtype).removeprefix("torch."),
        "rope_theta": rope["rope_theta"],  # where readers from before transformers 5 look for these two
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_ratio": rope["rope_theta"] / 10000,  # llama.cpp's converter takes these three by their published names
        "seq_length": merge.native.max_position_embeddings,
        "layernorm_epsilon": merge.native.rms_norm_eps,
    }
    write_json(folder / "config.json", config)
    native_tokenizer(merge.tokenizer).save_pretrained(folder)
    path = folder / "tokenizer_config.json"  # by the name that transformers 4 knows too
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"})


def write_adapter(merge: Merge, folder: Path):
    """The adapter under the native names: of a fused layer, A is copied and B cut like the layer's rows."""
    adapter, tensors, modules = merge.adapter, {}, set()
    for module, parts in adapter.layers.items():
        for part, tensor in parts.items():
            native = native_tensors(f"{module}.{part}", tensor, merge.config)
            modules |= {name.removesuffix(f".{part}") for name in native}
            tensors |= native
    whole = [
        native
        for name, tensor in adapter.replaced.items()
        for native in native_tensors(name, tensor, merge.config).items()
    ]
    saved = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in whole if not name.endswith(".bias")}
    names = {
        name: name.replace(".bias", ".base_layer.bias") if name.rpartition(".")[0] in modules else name
        for name, _ in whole
    }
    tensors |= {names[name]: tensor for name, tensor in whole}
    config = native_adapter_config(adapter.config, merge.config, sorted(modules), sorted(saved))
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)


def native_adapter_config(lora: peft.LoraConfig, config, modules: list[str], saved: list[str]) -> peft.LoraConfig:
    """The configuration of an exported adapter for `modules`. Raises ValueError where it could not be exact."""
    if lora.rank_pattern or lora.alpha_pattern:
        raise ValueError("An adapter with rank_pattern or alpha_pattern is not exported by itself: merge it.")
    if lora.init_lora_weights not in KEEP_THE_BASE:
        raise ValueError(
            f"An adapter that began with init_lora_weights={lora.init_lora_weights} belongs to a base that this "
            "changed, and is not exported by itself: merge it."
        )
    names = sorted({module.rpartition(".")[2] for module in modules})
    everywhere = len(modules) == len(names) * config.num_layers
    native = copy.copy(lora)
    native.target_modules = names if everywhere else sorted(modules)
    native.modules_to_save = saved or None
    native.init_lora_weights, native.base_model_name_or_path, native.revision = True, None, None
    native.layers_to_transform = native.layers_pattern = native.exclude_modules = None
    return native
