"""The flags of programs that load a model to answer, and what they mean; no slow library is needed for it."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_model_flags(parser: argparse.ArgumentParser):
    """What `loading.loaded` reads."""
    parser.add_argument("model", metavar="MODEL", help="adapter folder, model folder or hub name")
    parser.add_argument("--base_model", help="the base of an adapter, where it is not at the place noted in it")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python files that the checkpoint brings")

    loading = parser.add_argument_group("where and how the model is loaded")
    loading.add_argument("--device", help="default: the accelerator if there is one, else cpu")
    loading.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="default: bfloat16 (float16 on older cards), on the CPU as stored",
    )
    loading.add_argument(
        "--no_self_check",
        action="store_false",
        dest="self_check",
        help="do not compare answers with and without cache",
    )
    bits = loading.add_mutually_exclusive_group()
    bits.add_argument("--load_in_4bit", action="store_const", const=4, dest="bits", help="needs bitsandbytes")
    bits.add_argument("--load_in_8bit", action="store_const", const=8, dest="bits", help="needs bitsandbytes")


def add_sampling_flags(parser: argparse.ArgumentParser):
    """What `generation_options` reads."""
    sampling = parser.add_argument_group(
        "how answers are chosen (default: as the checkpoint says, else the likeliest)"
    )
    sampling.add_argument("--do_sample", action="store_true", default=None)
    sampling.add_argument("--no_do_sample", action="store_false", dest="do_sample", help="always the likeliest token")
    sampling.add_argument("--temperature", type=float)
    sampling.add_argument("--top_p", type=float)
    sampling.add_argument("--top_k", type=int)
    sampling.add_argument("--repetition_penalty", type=float)
    sampling.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer (default %(default)s)")
    sampling.add_argument("--seed", type=int, help="makes sampled answers repeatable")


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags say about generation; a flag of sampling asks for sampling. Raises ValueError."""
    names = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if options["max_new_tokens"] < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, not {options['max_new_tokens']}.")
    if {"temperature", "top_p", "top_k"} & set(options):
        if options.get("do_sample") is False:
            raise ValueError(
                "--no_do_sample takes the likeliest token: --temperature, --top_p, --top_k say nothing then."
            )
        options["do_sample"] = True
    return options


def tools_in(path: Path) -> list[dict]:
    """The list of tools in a JSON file. Raises ValueError if it is none."""
    try:
        tools = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--tools {path} is not JSON: {error}") from error
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"--tools {path} must hold a list of objects, one for each tool.")
    return tools
