"""Add LoRA adapters of one base up, each times its weight, into an adapter of its own.

    python scripts/add_adapters.py FIRST,SECOND 0.7,0.3 OUT [--base_model FOLDER]

OUT is exact (its rank is that of all adapters together) and is talked to, evaluated and merged as any adapter; its
tokenizer is that of the first. The base is loaded, as it is stored.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", metavar="FIRST,SECOND", help="folders or hub names, with commas")
    parser.add_argument("weights", metavar="WEIGHTS", help="a number for each, with commas")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--base_model", help="the base, where it is not at the place noted in the first adapter")
    return parser.parse_args()


def main():
    arguments = parsed_arguments()

    from merging.adding import write_sum  # late: it imports torch, which --help and mistakes in the flags do not need

    try:
        write_sum(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"Nothing was written: {error}")
    print(f"Wrote {arguments.out}")


if __name__ == "__main__":
    main()
