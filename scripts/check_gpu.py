#!/usr/bin/env python
"""Try on a GPU what the project promises, and how fast it is there; write gpu_report.md and gpu_report.json.

    python scripts/check_gpu.py [--minutes 8] [--output FOLDER]

Parts run one after the other, each in a process of its own that is stopped when its share of the time is over; what
fails is a line of the report. Weights are random and made on the device. Without a GPU everything runs at tiny shapes.
Exit code 1: something is wrong, or could not be tried.
"""

import argparse
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from gpu import fast, results, right  # noqa: E402


RELEASED = ("chatglm3-6b", "glm-4-9b", "chatglm-6b")
NANO = ("nano", "nano-6b")
FEW_WAYS = ("dynamic padding", "ours", "ours, packed")  # for the shapes after the first
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
GOALS = {"share_of_peak": 0.6, "idle_share": 0.05}  # of the first shape: at least, at most


def parts(shapes) -> dict[str, tuple]:
    """Name of each part: its share of the time, and what it does with (results, device)."""
    first, *others = shapes
    few = {name: fast.WAYS[name] for name in FEW_WAYS}

    def training(shape, ways):
        def check(found, device):
            found.add("matrix product", fast.matrix_peak, device)
            peak = results.read(found.path)[-1].get("tflops", float("nan"))
            fast.check_training(found, shape, device, peak, ways)

        return check

    return {
        "right": (0.2, right.check),
        "demo": (0.1, right.check_demo),
        "training": (0.3, training(first, fast.WAYS)),
        "answers": (0.1, lambda found, device: fast.check_answers(found, first, device)),
        "profile": (0.1, lambda found, device: fast.check_profile(found, first, device)),
        **{f"training {shape}": (0.2 / len(others), training(shape, few)) for shape in others},
    }


def run_part(name, deadline, options):
    """Run a part in a process of its own until the deadline; a line of the results says if it did not end well."""
    path = options.output / "gpu_results.jsonl"
    command = [sys.executable, __file__, "--part", name, "--ends", str(deadline), "--output", str(options.output)]
    try:
        code = subprocess.run(command, timeout=max(5.0, deadline + 10 - time.time())).returncode
        failed = f"its process ended with code {code}" if code else None
    except subprocess.TimeoutExpired:
        failed = "it was stopped, because its time was over"
    if failed:
        results.Results(path, name, deadline).write(f"part {name}", failed=failed)


def machine() -> dict:
    """The device and the versions of what computes on it."""
    on_gpu = torch.cuda.is_available()
    found = {"device": torch.cuda.get_device_name() if on_gpu else "CPU, tiny shapes"}
    if on_gpu:
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            found[package] = "not installed"
    return found


def verdict(line) -> str:
    if "failed" in line:
        return "FAILED"
    return "" if "bound" not in line else "right" if line["error"] <= line["bound"] else "WRONG"


def shown(value) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {shown(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(found) -> str:
    """The results as Markdown: what is wrong first, then a table for each part."""
    lines = [f"# {found['device']}", "", ", ".join(f"{name} {found[name]}" for name in PACKAGES), ""]
    bad = [line for line in found["results"] if verdict(line) in ("WRONG", "FAILED")]
    count = len(found["results"])
    lines += [f"{count - len(bad)} of {count} are as they should be, in {found['seconds']:.0f} s.", ""]
    lines += [f"* {line['name']}: {line.get('failed') or shown(line['error'])} ({verdict(line)})" for line in bad]
    lines += ["", *goals(found["results"]), ""]
    for part in dict.fromkeys(line["part"] for line in found["results"]):
        own = [line for line in found["results"] if line["part"] == part]
        columns = list(dict.fromkeys(key for line in own for key in line if key not in ("part", "name")))
        lines += [f"## {part}", "", f"| | {' | '.join(columns)} | |", "|" + "---|" * (len(columns) + 2)]
        for line in own:
            cells = (shown(line[key]).replace("|", "/") if key in line else "" for key in columns)
            lines.append(f"| {line['name']} | {' | '.join(cells)} | {verdict(line)} |")
        lines.append("")
    return "\n".join(lines)


def goals(lines) -> list[str]:
    """What was reached of the goals, in words."""
    packed = next((line for line in lines if line["name"].endswith("ours, packed") and "share_of_peak" in line), None)
    step = next((line for line in lines if "idle_share" in line), None)
    told = []
    if packed:
        told.append(
            f"Of the matrix peak: {packed['share_of_peak']:.1%} (goal: {GOALS['share_of_peak']:.0%} at least)."
        )
    if step:
        told.append(f"Of a step without a kernel: {step['idle_share']:.1%} (goal: {GOALS['idle_share']:.0%} at most).")
    return told


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
