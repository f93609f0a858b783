"""The model and the chatbot of a command line, whose flags are those in `flags`."""

import argparse
import sys
from typing import Any

import torch
import transformers

from finetuning.mistakes import named
from finetuning.self_checks import check_answers
from run_chatglm_lora import padding_id

from .chatbot import Chatbot
from .opening import opened


QUESTIONS = ["你好", "Who are you?"]  # of the self-check: two lengths


def chosen_device(arguments: argparse.Namespace) -> str:
    """Name of the device to load on. Raises ValueError for one that is not there."""
    if arguments.device:
        with named(f"--device {arguments.device}", RuntimeError, AssertionError):  # unknown, or not there
            torch.empty(0, device=arguments.device)
        return arguments.device
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def chosen_dtype(arguments: argparse.Namespace, device: str) -> str | None:
    """Name of the dtype to load in; None: as stored."""
    if arguments.dtype or device == "cpu":
        return arguments.dtype
    old = device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "float16" if old else "bfloat16"


def loaded(arguments: argparse.Namespace):
    """Model and tokenizer. Raises ValueError or OSError where something is missing or does not fit."""
    transformers.utils.logging.set_verbosity_error()
    device = chosen_device(arguments)
    print(f"Loading {arguments.model} on {device} ...", file=sys.stderr, flush=True)
    return opened(
        arguments.model,
        base_model=arguments.base_model,
        dtype=chosen_dtype(arguments, device),
        device=device,
        bits=arguments.bits,
        trust_remote_code=arguments.trust_remote_code,
    )


def chatbot(arguments: argparse.Namespace, options: dict[str, Any], tools: list[dict] | None = None) -> Chatbot:
    """The chatbot that generates with `options` and may call `tools`. Raises as `loaded`, and SelfCheckFailed."""
    model, tokenizer = loaded(arguments)
    if arguments.seed is not None:
        transformers.set_seed(arguments.seed)
    bot = Chatbot(model, tokenizer, options, tools)
    if arguments.self_check:
        questions = ([{"role": "user", "content": text}] for text in QUESTIONS)
        check_answers(model, [bot.prompt(messages)[0] for messages in questions], padding_id(tokenizer))
    return bot
