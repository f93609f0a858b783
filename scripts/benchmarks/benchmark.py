#!/usr/bin/env python
"""Train the same model on the same rows in several ways, and print what each costs.

    python scripts/benchmarks/benchmark.py [--output FILE.json] [--steps 10] [--shape tiny|chatglm3-6b|glm-4-9b|...]

static    every row padded to 1024 + 128 tokens, logits of every position: the recipe of the ChatGLM guides
dynamic   rows padded to the longest of their batch, logits of every position: what other tools do
ours      rows end to end without padding, logits where an answer is: the default of run_chatglm_lora.py
packed    rows gathered into packs of 8,192 tokens (of 1,024 in the tiny shape): --pack_to_length

Each way runs in a process of its own, under Trainer, with LoRA of rank 8 without dropout, so that the losses of the
first three are the same. The rows are random tokens in the lengths of AdvertiseGen (1,070 rows in GLM-4's vocabulary).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import SHAPES, WAYS


def table(results) -> str:
    """The figures of all ways, one line each, with their rates against the padded ways'."""
    columns = list(results[WAYS[0]])
    lines = [["way", *columns, "against static", "against dynamic"]]
    for way, figures in results.items():
        speeds = [figures["samples_per_second"] / results[other]["samples_per_second"] for other in WAYS[:2]]
        lines.append([way, *(f"{figures[name]:.4g}" for name in columns), *(f"{speed:.2f} x" for speed in speeds)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each way (default 10)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the random model (default tiny)")
    parser.add_argument("--way", choices=WAYS, help="measure this way only, in this process, and print it as JSON")
    options = parser.parse_args()
    if options.way:
        from benchmarks.training import measured  # late: it imports torch, which --help and mistakes do not need

        print(json.dumps(measured(options.way, options.shape, options.steps, options.batch_size)))
        return
    results = {}
    for way in WAYS:
        print(f"Training in the way '{way}' ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--way", way, "--steps", str(options.steps)]
        command += ["--shape", options.shape, "--batch_size", str(options.batch_size)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[way] = json.loads(output.splitlines()[-1])
    print(table(results))
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
