"""Add LoRA adapters of one base up, each times its weight, into an adapter of its own.

    python scripts/add_adapters.py FIRST,SECOND 0.7,0.3 OUT [--base_model FOLDER]

OUT is exact (its rank is that of all adapters together) and is talked to, evaluated and merged as any adapter; its
tokenizer is that of the first. The base is loaded, as it is stored.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opening import opened_base

from finetuning.adapters import adapter_folder, adapter_names, adapter_weights, base_of, weighted_sum
from run_chatglm_lora import ModelArguments, loaded_tokenizer


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", metavar="FIRST,SECOND", help="folders or hub names, with commas")
    parser.add_argument("weights", metavar="WEIGHTS", help="a number for each, with commas")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--base_model", help="the base, where it is not at the place noted in the first adapter")
    return parser.parse_args()


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


def main():
    arguments = parsed_arguments()
    try:
        write_sum(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"Nothing was written: {error}")
    print(f"Wrote {arguments.out}")


if __name__ == "__main__":
    main()
