"""Write a tiny random ChatGLM checkpoint in the published file layout, for tests and trial runs without a download.

    python scripts/tiny_chatglm.py DIR [--text FILE ...] [--generation chatglm2] [--hidden_size 64] [--num_layers 2]
                                      [--vocab_size 600] [--embedding_rows 65024]

The same arguments give the same files. The vocabulary is learnt from the strings in the text files (.json, .jsonl,
anything else line by line), or from a few built-in sentences.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from miniatures.releases import MARKER, RELEASES, SETTLED_IDS


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write the checkpoint")
    parser.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="what to learn pieces from")
    parser.add_argument("--generation", choices=list(RELEASES), default="chatglm3")
    parser.add_argument("--hidden_size", type=int, default=64, help="a multiple of 16 (4 heads, half of each rotated)")
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=600, help=f"pieces at most; more than {SETTLED_IDS}")
    parser.add_argument("--embedding_rows", type=int, default=0, help="at least; default as many as there are tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    arguments = parser.parse_args()
    if arguments.hidden_size % 16 or arguments.hidden_size <= 0:
        parser.error(f"--hidden_size {arguments.hidden_size} is not a multiple of 16")
    if arguments.vocab_size <= SETTLED_IDS + 4:
        parser.error(f"--vocab_size {arguments.vocab_size} leaves no room beside the {SETTLED_IDS} fixed pieces")
    for name, least in {"num_layers": 1, "embedding_rows": 0, "seed": 0}.items():
        if not least <= (value := getattr(arguments, name)) < 2**32:
            parser.error(f"--{name} must be at least {least} and less than 2**32, not {value}")
    for path in arguments.text:
        if not path.is_file():
            parser.error(f"--text {path} is not a file")
    directory = arguments.directory
    if directory.exists() and not directory.is_dir():
        parser.error(f"{directory} is a file")
    if directory.exists() and any(directory.iterdir()) and not (directory / MARKER).is_file():
        parser.error(f"{directory} holds files that this program did not write; name another folder or empty it")
    return arguments


def main():
    arguments = parsed_arguments()

    from miniatures.checkpoints import (
        write_checkpoint,  # late: it imports torch, which --help and mistakes do not need
    )

    try:
        print(write_checkpoint(arguments))
    except (OSError, ValueError) as error:
        sys.exit(f"tiny_chatglm.py: {error}")


if __name__ == "__main__":
    main()
