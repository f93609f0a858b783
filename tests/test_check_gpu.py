"""scripts/benchmarks/check_gpu.py: every line of it at tiny shapes, and what its report says."""

import argparse
import json
import time

import pytest
from benchmarks.gpu import fast, parts, report, results


@pytest.fixture
def tried(tmp_path):
    """Runs a part here, on the CPU; returns its results."""

    def run(name):
        path = tmp_path / "results.jsonl"
        parts.parts(parts.NANO)[name][1](results.Results(path, name, time.time() + 600), "cpu")
        return results.read(path)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("part", [name for name in parts.parts(parts.NANO) if name != "demo"])
def test_every_part_runs_at_tiny_shapes_and_finds_nothing_wrong(tried, part):
    found = tried(part)
    assert found and not [line for line in found if report.verdict(line) in ("WRONG", "FAILED")]


def test_what_fails_is_a_line_and_the_next_is_tried(tmp_path):
    tries = results.Results(tmp_path / "results.jsonl", "right", time.time() + 60)
    tries.add("broken", lambda: 1 / 0)
    tries.add("whole", lambda: {"error": 0.5, "bound": 0.1})
    late = results.Results(tmp_path / "results.jsonl", "answers", time.time() - 1)
    late.add("late", lambda: {"tokens_per_second": 1.0})
    found = results.read(tmp_path / "results.jsonl")
    assert [report.verdict(line) for line in found] == ["FAILED", "WRONG", "FAILED"]
    assert [line.get("failed") for line in found] == [
        "ZeroDivisionError: division by zero", None, "TimeoutError: no time was left for it",
    ]  # fmt: skip


def test_a_part_that_dies_leaves_its_results_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(parts.sys, "executable", "false")  # a program that fails
    options = argparse.Namespace(output=tmp_path)
    parts.run_part("answers", time.time() + 60, options)
    assert results.read(tmp_path / "gpu_results.jsonl") == [
        {"part": "answers", "name": "part answers", "failed": "its process ended with code 1"}
    ]


def test_report_says_first_what_is_wrong_and_what_was_reached():
    lines = [
        {"part": "right", "name": "logits", "seconds": 1.0, "error": 0.5, "bound": 0.1},
        {"part": "training", "name": "chatglm3-6b, ours, packed", "seconds": 1.0, "share_of_peak": 0.625},
        {"part": "profile", "name": "one step", "idle_share": 0.034, "kernels": {"gemm|1": 2.5}},
    ]
    versions = dict.fromkeys(report.PACKAGES, "1.0")
    text = report.report({"device": "NVIDIA X", **versions, "seconds": 12.0, "results": lines})
    assert text.index("2 of 3 are as they should be") < text.index("* logits: 0.5 (WRONG)") < text.index("## right")
    assert "Of the matrix peak: 62.5% (goal: 60% at least)." in text
    assert "Of a step without a kernel: 3.4% (goal: 5% at most)." in text
    assert "| one step | 0.034 | gemm/1: 2.5 |  |" in text


def test_time_that_several_kernels_share_counts_once():
    assert fast.covered([(0, 4), (2, 3), (3, 6), (10, 11)]) == 7


def test_machine_names_its_device_and_versions():
    assert set(json.loads(json.dumps(report.machine()))) >= {"device", "torch", "transformers"}
