"""Merge a LoRA adapter into its base model: a complete folder that needs neither PEFT nor the adapter.

    python scripts/merge_lora.py ADAPTER OUT [--format native] [--dtype bfloat16] [--base_model FOLDER]

`published` keeps the names, the layout and the code files of the base; it works for every model whose adapter sits in
linear layers or embeddings. `native` writes ChatGLM2, CodeGeeX2, ChatGLM3 and GLM-4 as transformers' GlmForCausalLM,
which loads without remote code. The result is opened in a fresh process and its logits are compared with those of base
and adapter; OUT appears when all that is done, and not before.

Weights are read and written one shard at a time. The comparison afterwards needs room for one copy of the model.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import transformers
from comparing import compared
from huggingface_hub import split_torch_state_dict_into_shards
from merging import Merge
from modelfile import check_ollama, write_modelfile
from native_export import write_adapter, write_json, write_native
from safetensors.torch import save_file

from chatglm import ChatGLMConfig
from chatglm.configuration_chatglm import SECOND_GENERATION
from chatglm.native import served_template
from finetuning.adapters import stop_ids
from finetuning.self_checks import SelfCheckFailed
from run_chatglm_lora import loaded_tokenizer, padding_id


TOKENIZER_FILES = ["tokenizer*", "*.model", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab*"]
KEPT_FILES = ["*.py", "*LICENSE*"]  # the code that was published with the base, and its terms


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or hub name of a LoRA adapter")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--format", choices=["published", "native"], default="published")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: as the base is stored")
    parser.add_argument("--base_model", help="the base, where it is not at the place noted in the adapter")
    parser.add_argument("--max_shard_size", default="2GB", help="of the files written; the memory needed goes with it")
    parser.add_argument("--ollama", action="store_true", help="write a Modelfile too (ChatGLM3 and GLM-4)")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--adapter_only", action="store_true", help="the adapter alone, for the native layout")
    parts.add_argument("--base_only", action="store_true", help="the base alone: what --adapter_only adapts")
    arguments = parser.parse_args()
    if arguments.adapter_only and arguments.format != "native":
        parser.error("--adapter_only changes the layout of an adapter: it goes with --format native")
    return arguments


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
    for folder in out.parent.glob(f".{out.name}.unfinished-*"):
        if psutil.pid_exists(process := int(folder.name.rpartition("-")[2])):
            raise ValueError(f"process {process} is writing {out}: wait for it, or name another folder.")
        print(f"Removing {folder}, which a merge left that was killed.", flush=True)
        shutil.rmtree(folder)


def main():
    arguments = parsed_arguments()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with unfinished(arguments.out) as folder:
            merge = Merge(arguments)
            if arguments.ollama:
                check_ollama(merge)
                write_modelfile(merge, folder)
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
