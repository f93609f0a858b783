#!/usr/bin/env python
"""Say where the time of a training step on a CPU goes: docs/performance.md has a table of it.

    python scripts/benchmarks/profile_step.py [--shape tiny] [--steps 5] [--batch_size 8] [--optim adamw_torch]

The model, its adapter and its rows are those of benchmark.py (way `ours`), with all callbacks of a run. Each
operation counts where it was called from or, failing that, by its shapes: the head has the vocabulary among them,
LoRA's small matrices the rank. What is no operation is Python: Trainer, modules, autograd.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import SHAPES


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--optim", help="default: Trainer's")
    options = parser.parse_args()

    from benchmarks.step_parts import milliseconds_of_steps  # late: it imports torch, which --help does not need

    parts = milliseconds_of_steps(options.shape, options.steps, options.batch_size, options.optim)
    whole = sum(parts.values())
    print(f"| part | ms a step | share |\n|---|---|---|\n| all | {whole / options.steps:.1f} | |")
    for name, milliseconds in parts.items():
        print(f"| {name} | {milliseconds / options.steps:.2f} | {milliseconds / whole:.1%} |")


if __name__ == "__main__":
    main()
