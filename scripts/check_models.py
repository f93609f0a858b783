"""Which causal models of transformers can be trained with rows end to end, padded, or not at all: a Markdown table.

    python scripts/check_models.py [TYPE ...] > table.md

A tiny random model of each type goes through the self-checks of a training; then the batches that they settled on are
compared with each row alone, on other rows. The exit code is 1 if any of these losses is wrong: nobody would notice.
"""

import argparse
import dataclasses
import logging
import sys
from collections import Counter
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "types", nargs="*", metavar="TYPE", help="default: all causal models, and the ChatGLM checkpoints"
    )
    arguments = parser.parse_args()

    import transformers  # late, as all that imports torch: --help and mistakes need none
    from miniatures.verdicts import ALL_TYPES, verdict

    transformers.logging.set_verbosity_error()
    logging.getLogger("run_chatglm_lora").setLevel(logging.ERROR)  # the table says it
    print(
        f"transformers {transformers.__version__}\n\n| type | batches | answers | why |\n|---|---|---|---|", flush=True
    )
    verdicts = []
    for name in arguments.types or ALL_TYPES:
        verdicts.append(verdict(name))
        print(f"| {' | '.join(dataclasses.astuple(verdicts[-1]))} |", flush=True)
    counts = Counter(each.batches for each in verdicts)
    print("\n" + ", ".join(f"{count} {batches}" for batches, count in counts.most_common()))
    sys.exit(1 if counts["WRONG"] else 0)


if __name__ == "__main__":
    main()
