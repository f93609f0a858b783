"""What is merged into what: the weights of a stored base, a LoRA adapter, and both together, layer by layer."""

import argparse
import copy
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from zipfile import is_zipfile

import peft
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from chatglm.configuration_chatglm import SECOND_GENERATION
from chatglm.native import native_config, native_tensors
from chatglm.quantization import dequantized_weight
from finetuning.adapters import adapter_config, base_of, local_folder
from finetuning.mistakes import named
from run_chatglm_lora import ModelArguments, loaded_config, loaded_tokenizer


WEIGHT_FILES = ["model.safetensors", "pytorch_model.bin"]


class BaseWeights:
    """The stored weights of a model folder, mapped one by one; published 8- and 4-bit weights come dequantised."""

    def __init__(self, folder: Path, bits: int):
        self.bits = bits
        self.files = stored_names(folder)
        self.names = [name for name in self.files if not name.endswith(".weight_scale")]

    def stored(self, name: str) -> torch.Tensor:
        """A weight as it is in its file; the data are read when they are used, and let go with the tensor."""
        path = self.files[name]
        if path.suffix != ".safetensors":
            return torch.load(path, weights_only=True, mmap=is_zipfile(path), map_location="cpu")[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
        """The weight; its shape and dtype alone with device "meta"."""
        weight = self.stored(name).to(device)
        if f"{name}_scale" in self.files:
            return dequantized_weight(weight, self.stored(f"{name}_scale").to(device), self.bits)
        return weight


def stored_names(folder: Path) -> dict[str, Path]:
    """The file of each weight in a model folder. Raises ValueError if there are none, or fewer than listed."""
    for name in WEIGHT_FILES:
        index, single = folder / f"{name}.index.json", folder / name
        if index.is_file():
            files = {key: folder / file for key, file in json.loads(index.read_text())["weight_map"].items()}
            missing = sorted({path.name for path in files.values() if not path.is_file()})
            if missing:
                raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists.")
            return files
        if single.suffix == ".safetensors" and single.is_file():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        if single.is_file():
            weights = torch.load(single, weights_only=True, mmap=is_zipfile(single), map_location="cpu")
            return dict.fromkeys(weights, single)
    raise ValueError(f"{folder} has no weights: neither {' nor '.join(WEIGHT_FILES)}, whole or in shards.")


class Adapter:
    """A LoRA adapter, merged layer by layer by PEFT itself: `changed(name, base)` is a base weight with its share."""

    def __init__(self, folder: Path, config: peft.LoraConfig):
        self.folder, self.config = folder, config
        self.layers = defaultdict(dict)  # module: its tensors by the names of their parts
        self.replaced = {}  # weights that were trained whole
        for name, tensor in peft.utils.load_peft_weights(str(folder), device="cpu").items():
            name = re.sub(r"^base_model\.model\.|\.(base_layer|modules_to_save)(?=\.)", "", name)
            module, is_lora, part = name.partition(".lora_")
            if is_lora:
                self.layers[module][f"lora_{part}"] = tensor
            else:
                self.replaced[name] = tensor

    def check_shapes(self, base: BaseWeights):
        """Raise a ValueError unless the base has every weight that the adapter changes, in the same shape."""
        expected = {name: list(tensor.shape) for name, tensor in self.replaced.items()}
        for module, parts in self.layers.items():
            if "lora_embedding_A" in parts:
                expected[f"{module}.weight"] = [parts["lora_embedding_A"].shape[1], parts["lora_embedding_B"].shape[0]]
            elif {"lora_A.weight", "lora_B.weight"} <= set(parts):
                expected[f"{module}.weight"] = [parts["lora_B.weight"].shape[0], parts["lora_A.weight"].shape[1]]
            else:
                raise ValueError(
                    f"{self.folder} holds {', '.join(parts)} for {module}, which is not LoRA as merged here."
                )
        for name, shape in expected.items():
            found = list(base.tensor(name, "meta").shape) if name in base.files else None
            if found and found[1:] == shape[1:] and found[0] < shape[0] and name in self.replaced:
                raise ValueError(
                    f"The adapter has more tokens than its base: {name} has {shape[0]} rows, in the base {found[0]}. "
                    "This script does not enlarge a base: use the adapter as it is."
                )
            if found != shape:
                has = f"has {found} there" if found else "has no such weight"
                raise ValueError(
                    f"The adapter was trained on another base: it changes {name} {shape}, this one {has}."
                )

    def check_tied(self, config):
        """Raise a ValueError if one of two layers that share a matrix is changed, which a merged model cannot show."""
        if not config.tie_word_embeddings:
            return
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        tied = [name for name, module in model.named_modules() if module in ends]
        for name in tied:
            if name in self.layers or f"{name}.weight" in self.replaced:
                raise ValueError(
                    f"The adapter changes {name}, which shares its matrix with another layer of this base: merged, "
                    "both would change. Use the adapter as it is, with PEFT."
                )

    def weight(self, name: str, base: BaseWeights) -> torch.Tensor:
        """The base's weight, changed where the adapter changes it: float32 where PEFT merged it."""
        module, _, kind = name.rpartition(".")
        if name in self.replaced:
            return self.replaced[name]
        if module in self.layers and (kind == "weight" or self.config.lora_bias):
            return getattr(self.merged_layer(module, base), kind).data
        return base.tensor(name)

    def merged_layer(self, module: str, base: BaseWeights) -> torch.nn.Module:
        """One layer with the adapter merged into it, in float32.

        PEFT is given a model that has this layer only, at its own place: what patterns and variants of LoRA mean for
        it (ranks, scales, DoRA, starts from a decomposition of the base) PEFT decides as it does for a whole model.
        """
        parts, weight = self.layers[module], base.tensor(f"{module}.weight").float()
        rows, columns = weight.shape
        if "lora_embedding_A" in parts:
            layer = torch.nn.Embedding(rows, columns, _weight=weight)
        else:
            layer = torch.nn.Linear(columns, rows, bias=f"{module}.bias" in base.files, device="meta")
            layer.weight = torch.nn.Parameter(weight)
            if layer.bias is not None:
                layer.bias = torch.nn.Parameter(base.tensor(f"{module}.bias").float())
        model = torch.nn.Module()
        parent = model
        *path, last = module.split(".")
        for name in path:
            parent.add_module(name, torch.nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, layer)
        config = copy.copy(self.config)
        config.modules_to_save, config.bias = None, "none"
        peft.inject_adapter_in_model(config, model)
        with named(f"adapter_config.json of {self.folder} does not fit the weights beside it", RuntimeError):
            tensors = {f"{module}.{part}": tensor.float() for part, tensor in parts.items()}
            peft.set_peft_model_state_dict(model, tensors)
        model.get_submodule(module).merge()  # safe_merge would need a third float32 copy of the layer
        merged = model.get_submodule(module).get_base_layer()
        if not all(torch.isfinite(weight).all() for weight in merged.parameters()):
            raise ValueError(f"The adapter makes infinities or NaN of {module}: its training went wrong.")
        return merged


def lora_config(folder: Path, name: str) -> peft.LoraConfig:
    """The configuration of a LoRA adapter. Raises ValueError for a folder that holds none."""
    config = adapter_config(folder)
    if config is None:
        raise ValueError(f"{name} is not an adapter: there is no adapter_config.json in it.")
    if not isinstance(config, peft.LoraConfig):
        way = "has no weights to merge: use it as it is, with PEFT"
        if not config.is_prompt_learning:
            way = "is merged by PEFT: `merge_and_unload` of the opened model, see docs/methods.md"
        raise ValueError(f"This script merges LoRA. {name} is {config.peft_type.value}, which {way}.")
    for option in ("trainable_token_indices", "target_parameters"):
        if getattr(config, option):
            raise ValueError(f"{name} was trained with {option}, which this script does not merge: use it as it is.")
    if config.fan_in_fan_out:
        raise ValueError(f"{name} adapts layers of GPT-2's kind (fan_in_fan_out): merge it with PEFT.")
    return config


class Merge:
    """What is merged into what: the adapter (or none of it, with --base_only), its base, and the layout to write."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.adapter_folder = local_folder(arguments.adapter)
        self.adapter = Adapter(self.adapter_folder, lora_config(self.adapter_folder, arguments.adapter))
        self.base_name, revision = base_of(self.adapter_folder, arguments.base_model)
        self.model_arguments = ModelArguments(self.base_name, model_revision=revision)
        self.base_folder = local_folder(self.base_name, revision)
        self.config = loaded_config(self.model_arguments)
        if getattr(self.config, "quantization_config", None):
            raise ValueError(
                f"{self.base_name} is stored quantised by another library: pass the 16-bit checkpoint that it was "
                "made from as --base_model."
            )
        self.native = native_config(self.config) if arguments.format == "native" else None
        self.bits = getattr(self.config, "quantization_bit", None) or 0
        self.base = BaseWeights(self.base_folder, self.bits)
        self.adapter.check_shapes(self.base)
        self.adapter.check_tied(self.config)
        self.tokenizer = loaded_tokenizer(self.model_arguments, str(self.adapter_folder))

    def parts(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights that are written for one of the base."""
        return native_tensors(name, weight, self.config) if self.native else {name: weight}

    def written(self, name: str) -> dict[str, torch.Tensor]:
        """The same, merged, in the dtype of the result."""
        weight = self.base.tensor(name) if self.arguments.base_only else self.adapter.weight(name, self.base)
        return self.parts(name, weight.to(self.outline(name).dtype))

    def outline(self, name: str) -> torch.Tensor:
        """Shape and dtype of the merged weight, without data."""
        weight = self.base.tensor(name, "meta")
        return weight.to(getattr(torch, self.arguments.dtype)) if self.arguments.dtype else weight


def remarks(merge: Merge) -> Iterator[str]:
    """What a user should know about this merge."""
    stored = str(merge.base.tensor(merge.base.names[0], "meta").dtype).removeprefix("torch.")
    if merge.bits:
        yield f"The base is quantised to {merge.bits} bits: its weights are dequantised to {stored} first."
    elif not merge.arguments.base_only:
        yield (
            f"Merging into the {stored} weights of {merge.base_name}: the unrounded ones, also for an adapter that "
            "was trained with --load_in_4bit or --load_in_8bit."
        )
    if merge.native and merge.config.generation in SECOND_GENERATION:
        yield (
            "GlmForCausalLM works out the rotary angles in float32, the published code of this model in the dtype of "
            "the weights: in 16 bits the two part a little as texts get longer."
        )
