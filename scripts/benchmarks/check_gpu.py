#!/usr/bin/env python
"""Try on a GPU what the project promises, and how fast it is there; write gpu_report.md and gpu_report.json.

    python scripts/benchmarks/check_gpu.py [--minutes 8] [--output FOLDER]

Parts run one after the other, each in a process of its own that is stopped when its share of the time is over; what
fails is a line of the report. Weights are random and made on the device. Without a GPU everything runs at tiny shapes.
Exit code 1: something is wrong, or could not be tried.
"""

import argparse
import json
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parsed_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="that all of it may take (default 8)")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the report (default: this one)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in this process
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = parsed_options()

    import torch  # late, as all that imports it: --help and mistakes need none

    from benchmarks.gpu import results
    from benchmarks.gpu.parts import NANO, RELEASED, parts, run_part
    from benchmarks.gpu.report import machine, report, verdict

    on_gpu = torch.cuda.is_available()
    known = parts(RELEASED if on_gpu else NANO)
    path = options.output / "gpu_results.jsonl"
    if options.part:
        known[options.part][1](results.Results(path, options.part, options.ends), "cuda" if on_gpu else "cpu")
        return
    chosen = {name: known[name][0] for name in options.only or known}
    options.output.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    began = time.time()
    ends = began + 60 * options.minutes
    left = sum(chosen.values())
    for name, share in chosen.items():  # what a part leaves of its time is shared out among the next
        run_part(name, time.time() + (ends - time.time()) * share / left, options)
        left -= share
    found = {**machine(), "seconds": time.time() - began, "results": results.read(path)}
    path.unlink(missing_ok=True)
    (options.output / "gpu_report.json").write_text(json.dumps(found, indent=2) + "\n")
    text = report(found)
    (options.output / "gpu_report.md").write_text(text, encoding="utf-8")
    print(text)
    sys.exit(any(verdict(line) in ("WRONG", "FAILED") for line in found["results"]))


if __name__ == "__main__":
    main()
