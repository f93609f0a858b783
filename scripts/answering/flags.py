"""The flags of programs that load a model to answer, and what they mean; no slow library is needed for it."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def number(kind: type, words: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A `type` for argparse: a number that `fits`, in `words`; any other is a mistake, which it tells."""

    def read(text: str):
        value = kind(text)
        if not (math.isfinite(value) and fits(value)):
            raise argparse.ArgumentTypeError(f"must be {words}, not {text}")
        return value

    read.__name__ = kind.__name__  # argparse says it of what is no number at all
    return read


at_least_0, at_least_1 = (number(int, f"at least {least}", lambda n, least=least: n >= least) for least in (0, 1))
above_0 = number(float, "above 0", lambda n: n > 0)
share = number(float, "above 0 and at most 1", lambda n: 0 < n <= 1)
seed = number(int, "at least 0 and less than 2**32", lambda n: 0 <= n < 2**32)
port = number(int, "from 1 to 65535", lambda n: 0 < n < 2**16)


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
    sampling.add_argument("--temperature", type=above_0)
    sampling.add_argument("--top_p", type=share)
    sampling.add_argument("--top_k", type=at_least_0)
    sampling.add_argument("--repetition_penalty", type=above_0)
    sampling.add_argument(
        "--max_new_tokens", type=at_least_1, default=1024, help="longest answer (default %(default)s)"
    )
    sampling.add_argument("--seed", type=seed, help="makes sampled answers repeatable")


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags say about generation; a flag of sampling asks for sampling. Raises ValueError."""
    names = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
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
    except (ValueError, RecursionError) as error:  # no UTF-8 either
        raise ValueError(f"--tools {path} is not JSON: {error}") from error
    if not isinstance(tools, list) or not tools or not all(map(is_tool, tools)):
        raise ValueError(f"--tools {path} must hold a list of objects, one for each tool, each with its name.")
    return tools


def is_tool(value: Any) -> bool:
    """Whether a value is a tool in OpenAI's form, bare or as {"type": "function", "function": ...}."""
    function = value.get("function", value) if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
