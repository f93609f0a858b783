"""The bar of a training, and the picture that grows with it."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from tiny import CHAT_FLAGS

from finetuning import loss_plot, progress


@pytest.fixture
def flags(llama, chats):
    evaluation = [
        "--validation_file",
        chats,
        "--do_eval",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        2,
        "--max_target_length",
        16,
    ]
    return [
        "--model_name_or_path",
        llama,
        "--train_file",
        chats,
        CHAT_FLAGS,
        "--do_train",
        "--max_steps",
        4,
        evaluation,
    ]


def test_bar_holds_loss_rate_and_speed_and_no_line_is_written_for_a_loss(run, flags, capsys):
    run(flags, "--disable_tqdm", "False")
    shown = capsys.readouterr()
    bar = shown.err.split("\r")
    assert any(
        re.match(r"Training: 100%.*4/4 \[.*loss=\d\.\d{4}, lr=\d\.\d\de-\d\d, tokens/s=[\d,]+\]", line) for line in bar
    )
    assert "'loss'" not in shown.out + shown.err and "eval_loss" in shown.out


def test_log_that_is_no_terminal_has_lines_and_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: False))
    assert progress.bar_defaults({}) == {"disable_tqdm": True} and progress.bar_defaults({"disable_tqdm": 1}) == {}
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    assert progress.bar_defaults({}) == {"disable_tqdm": False}


def test_bar_of_a_resumed_run_begins_at_its_step(monkeypatch, capsys):
    bar = progress.Progress()
    state = SimpleNamespace(global_step=6, max_steps=10, is_world_process_zero=True)
    bar.on_train_begin(None, state, None)
    state.global_step = 7
    bar.on_step_end(None, state, None)
    assert (bar.training_bar.n, bar.training_bar.initial) == (7, 6)
    bar.on_train_end(None, state, None)


def test_picture_grows_at_evaluations(run, flags, monkeypatch):
    drawn, draw = [], loss_plot.draw_logs

    def record(logs, path):
        draw(logs, path)
        (log,) = logs.values()
        drawn.append((log[-1]["step"], path.read_bytes()[:4]))

    monkeypatch.setattr(loss_plot, "draw_logs", record)
    monkeypatch.setattr(progress, "SHARE_OF_TIME", 1e9)
    folder = run(flags, "--plot_loss")
    assert drawn == [(step, b"\x89PNG") for step in (2, 4, 4, 4)]  # evaluations, the one at the end, the end
    assert not list(folder.glob(".*.new"))
    drawn.clear()
    run(flags, "--no_plot_loss", output="undrawn")
    assert not drawn


def test_picture_takes_no_more_than_its_share_of_the_time(monkeypatch, tmp_path):
    now, drawn = [0.0], []
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def draw(logs, path):
        drawn.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr(loss_plot, "draw_logs", draw)
    picture = progress.GrowingPicture()
    args, state = SimpleNamespace(should_save=True, output_dir=tmp_path), SimpleNamespace(log_history=[{"loss": 1}])
    for now[0] in (0.0, 20.0, 50.9, 51.0):
        picture.on_evaluate(args, state, None)
    assert drawn == [0.0, 51.0]


def test_accuracy_of_evaluations_has_a_panel(run, flags, monkeypatch):
    folder = run(flags)
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    steps, values = loss_plot.curve(log, "eval_accuracy")
    assert steps == [2, 4] and loss_plot.PANELS["accuracy"] == {"eval_accuracy": "evaluation"} and max(values) <= 1
