"""The rows that scripts/compare_tools.py makes, and what it works out of the steps that the tools log."""

import json

import compare_tools
import numpy as np
import pytest
from benchmarks.row_lengths import ANSWER_TOKENS, PERCENTILES, PROMPT_TOKENS
from compare_tools import Step, figures, table
from tiny import ROOT

from finetuning import flag_names


def test_rows_have_the_lengths_of_advertisegen_and_are_the_same_in_all_files(tmp_path):
    compare_tools.write_rows(tmp_path, 1070)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").open(encoding="utf-8")]
    for place, tokens in enumerate((PROMPT_TOKENS, ANSWER_TOKENS)):
        lengths = [len(row[place]["content"]) for row in rows]
        assert np.percentile(lengths, PERCENTILES[1:-2]) == pytest.approx(tokens[1:-2], abs=2)
        assert tokens[0] <= min(lengths) and max(lengths) <= tokens[-1]
    pairs = [json.loads(line) for line in (tmp_path / "prompts/rows.jsonl").open(encoding="utf-8")]
    assert [pair["prompt"] + pair["completion"] for pair in pairs] == rows
    assert compare_tools.random_rows(1070) == rows and {len(row) for row in rows} == {2}


@pytest.mark.parametrize(
    "line",
    [
        "{'loss': 11.5, 'grad_norm': 0.3, 'learning_rate': 0.001, 'epoch': 0.25}",
        "{'loss': '11.5', 'grad_norm': '0.3', 'mean_token_accuracy': '0.1', 'epoch': '0.25'}",
    ],
)
def test_steps_are_found_in_the_logs_of_trainers_old_and_new(line):
    assert compare_tools.STEP.search(f"{line}\n").groups() == ("11.5", "0.25")
    assert not compare_tools.STEP.search("{'train_runtime': 3.2, 'train_loss': 11.5, 'epoch': 0.25}")


def test_speed_is_that_of_the_rows_of_the_timed_steps():
    # 100 rows: 50 of them in the last two steps, which took 10 seconds.
    steps = [Step(30, 11.5, 0.25, 1.0), Step(40, 11, 0.5, 1.5), Step(45, 10, 0.75, 1.5), Step(50, 9, 1.0, 1.25)]
    assert figures(steps, rows=100) == {
        "samples_per_second": 5.0, "peak_memory_gib": 1.25, "first_loss": 11.5, "last_loss": 9, "steps": 4,
    }  # fmt: skip


def test_table_compares_medians_with_the_first_tool_and_names_what_failed():
    ours, packed, padded = compare_tools.TOOLS[:3]
    rounds = {ours: [{"rows": 20.0}, {"rows": 30.0}, {"rows": 90.0}], padded: [{"rows": 12.0}]}
    assert table(rounds, {packed: "OSError: no space"}).splitlines() == [
        "| tool | setting | rows | ours is faster |",
        "| --- | --- | --- | --- |",
        "| ours | as it comes | 30 (20 to 90) | 1.00 x |",
        f"| {padded.name} | {padded.setting} | 12 | 2.50 x |",
        "",
        f"{packed.name}, {packed.setting}: no result. `OSError: no space`",
    ]
    assert table({}, {packed: "OSError: no space"}).splitlines()[-1].endswith("no result. `OSError: no space`")


def test_reason_of_a_failure_is_the_last_line_with_words():
    assert compare_tools.last_line("Traceback\nValueError: no flash\n\n  ^^^\n") == "ValueError: no flash"
    assert compare_tools.last_line("") == "it wrote nothing"


@pytest.mark.parametrize("way", compare_tools.WAYS, ids=lambda way: f"{way.name}, {way.setting}")
def test_flags_of_each_way_are_those_of_the_script(tmp_path, way):
    words = compare_tools.command_of(way, tmp_path, tmp_path, steps=4)
    flag_names.check_words(words[words.index(str(ROOT / "run_chatglm_lora.py")) + 1 :], ROOT / "run_chatglm_lora.py")
