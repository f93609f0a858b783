"""The parts of check_gpu.py, and how each is run in a process of its own."""

import subprocess
import sys
import time
from pathlib import Path

from . import fast, results, right


PROGRAM = Path(__file__).resolve().parents[1] / "check_gpu.py"
RELEASED = ("chatglm3-6b", "glm-4-9b", "chatglm-6b")
NANO = ("nano", "nano-6b")
FEW_WAYS = ("dynamic padding", "ours", "ours, packed")  # for the shapes after the first


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
    command = [sys.executable, str(PROGRAM), "--part", name, "--ends", str(deadline), "--output", str(options.output)]
    try:
        code = subprocess.run(command, timeout=max(5.0, deadline + 10 - time.time())).returncode
        failed = f"its process ended with code {code}" if code else None
    except subprocess.TimeoutExpired:
        failed = "it was stopped, because its time was over"
    if failed:
        results.Results(path, name, deadline).write(f"part {name}", failed=failed)
