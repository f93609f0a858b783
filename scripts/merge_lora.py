"""Merge a LoRA adapter into its base model: a complete folder that needs neither PEFT nor the adapter.

    python scripts/merge_lora.py ADAPTER OUT [--format native] [--dtype bfloat16] [--base_model FOLDER]

`published` keeps the names, the layout and the code files of the base; it works for every model whose adapter sits in
linear layers or embeddings. `native` writes ChatGLM2, CodeGeeX2, ChatGLM3 and GLM-4 as transformers' GlmForCausalLM,
which loads without remote code. The result is opened in a fresh process and its logits are compared with those of base
and adapter; OUT appears when all that is done, and not before.

Weights are read and written one shard at a time. The comparison afterwards needs room for one copy of the model.
"""

import argparse
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from zipfile import is_zipfile


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peft
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from opening import opened, opened_base, tokenizer_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chatglm import ChatGLMConfig
from chatglm.configuration_chatglm import SECOND_GENERATION
from chatglm.modeling_chatglm import ChatGLMRotaryEmbedding
from chatglm.native import native_config, native_tensors, native_tokenizer
from chatglm.quantization import dequantized_weight
from finetuning.adapters import adapter_config, base_of, local_folder, stop_ids
from finetuning.self_checks import SelfCheckFailed, check_cached, relative_difference, rounding_bound
from run_chatglm_lora import ModelArguments, loaded_config, loaded_tokenizer, padding_id


ROOT = Path(__file__).resolve().parent.parent
WEIGHT_FILES = ["model.safetensors", "pytorch_model.bin"]
TOKENIZER_FILES = ["tokenizer*", "*.model", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab*"]
KEPT_FILES = ["*.py", "*LICENSE*"]  # the code that was published with the base, and its terms
KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")  # ways to begin an adapter; others change the base
MESSAGES = [{"role": "user", "content": "你好！请介绍一下你自己。\n\ndef add(a, b):\n    return a + b  # 3.14"}]

# Relative error of the logits, as a vector, up to which two models are the same: rounding merged weights to 16 bits
# moves them by some thousandths (float16) or hundredths (bfloat16); a forgotten or doubled adapter by much more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}

FRESH_PROCESS = """
import json, sys
folder, messages, out, package = sys.argv[1:]
if package:
    sys.path.insert(0, package)
    import chatglm
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = json.loads(messages)
ids = tokenizer(messages[0]["content"])["input_ids"]
if tokenizer.chat_template:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": device})
with torch.no_grad():
    given = torch.tensor([ids], device=device)
    logits = model(given).logits[0].float().cpu()
    answer = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=8, min_new_tokens=8, do_sample=False, num_beams=1,
        use_cache=True, output_logits=True, return_dict_in_generate=True,
    )
    cached = torch.cat(answer.logits).float().cpu()
    whole = model(answer.sequences, use_cache=False).logits[0, len(ids) - 1 : -1].float().cpu().contiguous()
save_file({"ids": torch.tensor(ids), "logits": logits, "cached": cached, "whole": whole}, out)
"""


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or hub name of a LoRA adapter")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--format", choices=["published", "native"], default="published")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: as the base is stored")
    parser.add_argument("--base_model", help="the base, where it is not at the place noted in the adapter")
    parser.add_argument("--max_shard_size", default="2GB", help="of the files written; the memory needed goes with it")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--adapter_only", action="store_true", help="the adapter alone, for the native layout")
    parts.add_argument("--base_only", action="store_true", help="the base alone: what --adapter_only adapts")
    arguments = parser.parse_args()
    if arguments.adapter_only and arguments.format != "native":
        parser.error("--adapter_only changes the layout of an adapter: it goes with --format native")
    return arguments


# --------------------------------------------------------------------------------------------------------- the base


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


# ------------------------------------------------------------------------------------------------------ the adapter


class Adapter:
    """A LoRA adapter, merged layer by layer by PEFT itself: `changed(name, base)` is a base weight with its share."""

    def __init__(self, folder: Path, config: peft.LoraConfig):
        self.folder, self.config = folder, config
        self.layers, self.replaced = (
            defaultdict(dict),
            {},
        )  # tensors of adapted layers; weights that were trained whole
        for name, tensor in peft.utils.load_peft_weights(str(folder), device="cpu").items():
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
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
        peft.set_peft_model_state_dict(model, {f"{module}.{part}": tensor.float() for part, tensor in parts.items()})
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
        raise ValueError(
            f"{name} is {config.peft_type.value}, which adds to the model's input: only LoRA can be merged."
        )
    if config.fan_in_fan_out:
        raise ValueError(f"{name} adapts layers of GPT-2's kind (fan_in_fan_out): merge it with PEFT.")
    return config


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


# ------------------------------------------------------------------------------------------------------- the result


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
        self.tokenizer = tokenizer_of(self.adapter_folder, self.model_arguments)

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


def write_weights(merge: Merge, folder: Path):
    """The merged weights as safetensors shards with an index, one shard in memory at a time."""
    sources = {name: source for source in merge.base.names for name in merge.parts(source, merge.outline(source))}
    outlines = {
        name: part for source in merge.base.names for name, part in merge.parts(source, merge.outline(source)).items()
    }
    plan = split_torch_state_dict_into_shards(outlines, max_shard_size=merge.arguments.max_shard_size)
    check_space(folder, plan.metadata["total_size"])
    written = lru_cache(maxsize=1)(merge.written)  # three parts of one weight follow each other
    for number, (file, names) in enumerate(plan.filename_to_tensors.items(), 1):
        save_file({name: written(sources[name])[name].contiguous() for name in names}, folder / file, {"format": "pt"})
        size = (folder / file).stat().st_size / 1e9
        print(f"{file}: {len(names)} weights, {size:.2f} GB ({number} of {len(plan.filename_to_tensors)})", flush=True)
    if plan.is_sharded:
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename},
        )


def check_space(folder: Path, size: int):
    """Raise a ValueError if the disk has no room for `size` bytes and the small files."""
    free = shutil.disk_usage(folder).free
    if free < size * 1.01 + 2**25:
        raise ValueError(f"{size / 1e9:.1f} GB are to be written, but {folder.parent} has {free / 1e9:.1f} GB left.")


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_companions(merge: Merge, folder: Path):
    """Configuration, tokenizer and generation settings beside the weights."""
    path = merge.base_folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    end = generation.get("eos_token_id", merge.config.eos_token_id)
    generation["eos_token_id"] = stop_ids(merge.tokenizer, end)
    generation["pad_token_id"] = padding_id(merge.tokenizer)
    write_json(folder / "generation_config.json", generation)
    if merge.native:
        write_native(merge, folder, generation["eos_token_id"])
    else:
        write_published(merge, folder)


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


def write_published(merge: Merge, folder: Path):
    """The files of the base, with the tokenizer that the adapter was trained with if it is another one."""
    config = json.loads((merge.base_folder / "config.json").read_text(encoding="utf-8"))
    if isinstance(merge.config, ChatGLMConfig):
        config["generation"] = merge.config.generation  # not to be guessed from the new folder's name
    config.pop("quantization_bit", None)
    if merge.arguments.dtype:
        config["dtype" if "dtype" in config else "torch_dtype"] = merge.arguments.dtype
    write_json(folder / "config.json", config)
    own = loaded_tokenizer(merge.model_arguments)
    same = (own.chat_template, len(own)) == (merge.tokenizer.chat_template, len(merge.tokenizer))
    copy_files(merge.base_folder if same else merge.adapter_folder, folder, TOKENIZER_FILES)
    copy_files(merge.base_folder, folder, KEPT_FILES)


def copy_files(source: Path, folder: Path, patterns: list[str]):
    for path in {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, folder / path.name)


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


# --------------------------------------------------------------------------------------------------- the comparison


def compared(merge: Merge, folder: Path) -> float:
    """The largest difference between the logits of the folder, in a fresh process, and those of base and adapter.

    Raises ValueError if they are not the same model, or the folder's tokenizer writes another prompt.
    """
    ids, expected, dtype = unmerged_logits(merge)
    found = logits_in_fresh_process(folder, package=None if merge.native else ROOT)
    if found["ids"].tolist() != ids:
        raise ValueError(f"the tokenizer of the result encodes a prompt as {found['ids'].tolist()}, not as {ids}.")
    difference = found["logits"] - expected  # [S, V]
    error = float(difference.norm() / expected.norm())
    if not error <= TOLERANCE[dtype]:  # NaN too
        raise ValueError(
            f"the logits of the result differ from those of base and adapter by {error:.2%} (largest difference "
            f"{difference.abs().max():.3g}), more than rounding explains."
        )
    moved = relative_difference(found["cached"], found["whole"])
    check_cached(moved, rounding_bound(torch.finfo(dtype).eps), "The result")
    return float(difference.abs().max())


@torch.no_grad()
def unmerged_logits(merge: Merge) -> tuple[list[int], torch.Tensor, torch.dtype]:
    """Ids [S] of the prompt, logits [S, V] of base and adapter for it, and the dtype that they were computed in."""
    arguments, tokenizer = merge.arguments, merge.tokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loading = {"dtype": arguments.dtype, "device": device}
    if arguments.base_only:
        model = opened_base(merge.model_arguments, **loading)
    else:
        model, _ = opened(str(merge.adapter_folder), arguments.base_model, **loading)
    ids = tokenizer(MESSAGES[0]["content"])["input_ids"]
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    for module in model.modules():
        if merge.native and isinstance(module, ChatGLMRotaryEmbedding):
            module.angles_in_model_dtype = False  # see `remarks`
    logits = model(torch.tensor([ids], device=device)).logits[0]
    return ids, logits.float().cpu(), logits.dtype


def logits_in_fresh_process(folder: Path, package: Path | None) -> dict[str, torch.Tensor]:
    """`ids` [S] and `logits` [S, V] of a folder, in a process that knows `chatglm` from `package` only."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "logits.safetensors")
        command = [sys.executable, "-c", FRESH_PROCESS, str(folder.resolve()), json.dumps(MESSAGES), str(out)]
        run = subprocess.run([*command, str(package or "")], cwd=scratch, capture_output=True, text=True)
        if run.returncode:
            raise ValueError(f"the result does not open: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
        return load_file(out)


# --------------------------------------------------------------------------------------------------------------- main


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


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, and is removed on any error or a polite kill."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: name another folder, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped; nothing was written."))
    try:
        folder.mkdir()
        yield folder
        os.replace(folder, out)
    finally:
        signal.signal(signal.SIGTERM, handler)
        shutil.rmtree(folder, ignore_errors=True)


def main():
    arguments = parsed_arguments()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with unfinished(arguments.out) as folder:
            merge = Merge(arguments)
            for remark in remarks(merge):
                print(remark, flush=True)
            if arguments.adapter_only:
                write_adapter(merge, folder)
            else:
                write_weights(merge, folder)
                write_companions(merge, folder)
                print("Comparing the logits with those of base and adapter ...", flush=True)
                difference = compared(merge, folder)
                print(f"The same model: largest difference of a logit {difference:.2g}.")
    except (OSError, ValueError, SelfCheckFailed) as error:
        sys.exit(f"Nothing was written: {error}")
    print(f"Wrote {arguments.out}")


if __name__ == "__main__":
    main()
