"""The folder of a merged model: weights shard by shard, and what lies beside them."""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import psutil
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from chatglm import ChatGLMConfig
from chatglm.native import served_template
from finetuning.adapters import stop_ids
from run_chatglm_lora import loaded_tokenizer, padding_id

from .native_export import write_json, write_native
from .weights import Merge


TOKENIZER_FILES = ["tokenizer*", "*.model", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab*"]
KEPT_FILES = ["*.py", "*LICENSE*"]  # the code that was published with the base, and its terms


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, and is removed on any error or a polite kill."""
    out = out.resolve()  # "." has no name, and a folder cannot take that of a link
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: name another folder, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(out)
    folder = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped; nothing was written."))
    try:
        folder.mkdir()
        yield folder
        os.replace(folder, out)
    finally:
        signal.signal(signal.SIGTERM, handler)
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(out: Path):
    """Remove what a merge into `out` left that was killed; ValueError if one is at work."""
    beginning = f".{out.name}.unfinished-"
    for folder in out.parent.iterdir():
        if not re.fullmatch(re.escape(beginning) + r"\d+", folder.name):
            continue
        if psutil.pid_exists(process := int(folder.name.rpartition("-")[2])):
            raise ValueError(f"process {process} is writing {out}: wait for it, or name another folder.")
        print(f"Removing {folder}, which a merge left that was killed.", flush=True)
        shutil.rmtree(folder)


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
    if merge.tokenizer.chat_template:  # published folders have none, and engines then make up a prompt of their own
        (folder / "chat_template.jinja").write_text(served_template(merge.tokenizer), encoding="utf-8")


def copy_files(source: Path, folder: Path, patterns: list[str]):
    for path in {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, folder / path.name)
