"""Several adapters of one base as one: for add_adapters.py."""

import argparse

from answering.opening import opened_base

from finetuning.adapters import adapter_folder, adapter_names, adapter_weights, base_of, weighted_sum
from run_chatglm_lora import ModelArguments, loaded_tokenizer

from .writing import unfinished


def write_sum(arguments: argparse.Namespace):
    """Raises ValueError or OSError where something is missing or cannot be added up: then nothing is written."""
    names = adapter_names(arguments.adapters)
    weights, first = adapter_weights(names, arguments.weights), adapter_folder(names[0])
    if first is None:
        raise ValueError(f"{names[0]} is not an adapter: there is no adapter_config.json in it.")
    base, revision = base_of(first, arguments.base_model)
    model_arguments = ModelArguments(base, model_revision=revision)
    added = weighted_sum(opened_base(model_arguments), names, weights)
    with unfinished(arguments.out) as folder:
        added.save_pretrained(folder)
        loaded_tokenizer(model_arguments, str(first)).save_pretrained(folder)
