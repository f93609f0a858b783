"""Several adapters of one base as one: for add_adapters.py."""

import argparse

from answering.opening import opened_base

from finetuning.adapters import adapter_folder, adapter_names, adapter_weights, base_of, weighted_sum
from run_chatglm_lora import ModelArguments, loaded_tokenizer


def write_sum(arguments: argparse.Namespace):
    """Raises ValueError or OSError where something is missing or cannot be added up."""
    if arguments.out.exists():
        raise ValueError(f"{arguments.out} exists already: name another folder, or remove it.")
    names = adapter_names(arguments.adapters)
    weights, first = adapter_weights(names, arguments.weights), adapter_folder(names[0])
    if first is None:
        raise ValueError(f"{names[0]} is not an adapter: there is no adapter_config.json in it.")
    base, revision = base_of(first, arguments.base_model)
    model_arguments = ModelArguments(base, model_revision=revision)
    added = weighted_sum(opened_base(model_arguments), names, weights)
    added.save_pretrained(arguments.out)
    loaded_tokenizer(model_arguments, str(first)).save_pretrained(arguments.out)
