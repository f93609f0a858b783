"""Hold the memory that --dry_run tells against the peak of real training steps on this machine's CPU.

    python scripts/benchmarks/check_estimate.py

Each shape is trained for two steps in a process of its own: random weights of a Llama, AdamW. What is measured is the
most that the process had resident, less what it had before the model was made; it takes a few GiB, and some minutes.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHAPES = {  # rows, tokens of each, and what else is different
    "LoRA": {"rows": 4, "tokens": 384},
    "LoRA, gradient checkpointing": {"rows": 8, "tokens": 384, "checkpointing": True},
    "all weights": {"rows": 2, "tokens": 256, "lora": False},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="run this one here, and print its two numbers")
    name = parser.parse_args().shape
    if name:
        from benchmarks.step_memory import told_and_measured  # late: it imports torch, which --help does not need

        print(json.dumps(told_and_measured(SHAPES[name])))
        return
    # Small blocks go back to the system at once, so that resident is what lives.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    print(f"{'shape':<32}{'told, MiB':>12}{'measured':>12}{'ratio':>8}")
    for name in SHAPES:
        words = [sys.executable, __file__, "--shape", name]
        output = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        numbers = [count / 2**20 for count in json.loads(output.splitlines()[-1])]
        print(f"{name:<32}{numbers[0]:>12.0f}{numbers[1]:>12.0f}{numbers[0] / numbers[1]:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
