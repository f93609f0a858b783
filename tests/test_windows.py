"""What is not on Windows is not asked for when the script is imported."""

import subprocess
import sys

from tiny import ROOT


def test_everything_is_imported_without_resource_and_fcntl():
    rooms = [f"finetuning.{path.stem}" for path in (ROOT / "finetuning").glob("[a-z]*.py")]
    # Libraries may have branches of their own for Windows: what they have imported before stays.
    code = (
        "import sys, torch, datasets, peft, transformers, filelock, psutil, accelerate, evaluate\n"
        "sys.modules['resource'] = sys.modules['fcntl'] = None\n"
        f"import {', '.join(rooms)}, run_chatglm_lora\n"
        "assert finetuning.throughput.resource is None"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
