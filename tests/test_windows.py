"""What is not on Windows is not asked for when the script is imported."""

from processes import forked_program
from tiny import ROOT


def test_everything_is_imported_without_resource_and_fcntl(tmp_path):
    rooms = [f"finetuning.{path.stem}" for path in (ROOT / "finetuning").glob("[a-z]*.py")]
    # Libraries may have branches of their own for Windows: what they have imported before stays.
    code = (
        "import sys, torch, datasets, peft, transformers, filelock, psutil, accelerate, evaluate\n"
        "sys.modules['resource'] = sys.modules['fcntl'] = None\n"
        f"import {', '.join(rooms)}, run_chatglm_lora\n"
        "assert finetuning.throughput.resource is None"
    )
    (tmp_path / "importing.py").write_text(code)
    ended = forked_program(tmp_path / "importing.py", packages=[ROOT])
    assert ended.returncode == 0, ended.stderr
