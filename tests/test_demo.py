"""The main job from end to end, as a newcomer starts it."""

import os
import subprocess
import sys

import pytest
from tiny import ROOT


pytestmark = pytest.mark.oldest


@pytest.mark.slow
def test_demo_teaches_the_answers_and_a_second_run_reuses_what_exists(tmp_path):
    def demo():
        command = ["bash", str(ROOT / "scripts/demo.sh"), str(tmp_path / "out")]
        environment = {**os.environ, "PYTHON": sys.executable}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    first = demo()
    assert "answers come back word for word" in first and "== Tuning with LoRA" in first
    assert (tmp_path / "out/adapter/training_loss.png").read_bytes().startswith(b"\x89PNG")
    trained = (tmp_path / "out/adapter/adapter_model.safetensors").stat().st_mtime_ns
    second = demo()
    assert "== " not in second and second.splitlines()[-1] == first.splitlines()[-1]
    assert (tmp_path / "out/adapter/adapter_model.safetensors").stat().st_mtime_ns == trained
