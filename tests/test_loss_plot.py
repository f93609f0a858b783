"""The picture of the losses, from scripts/plot_loss.py and at the end of a training."""

import importlib.util
import json
import math
import shutil
import sys

import pytest
from tiny import CHAT_FLAGS
from trained import script


SHORT = ["--max_target_length", 16]
LOG = [{"step": step, "loss": 3.0 / step, "learning_rate": 1e-3, "epoch": step / 9} for step in (1, 2, 3)]


@pytest.fixture
def figures(monkeypatch):
    """The pictures that were saved, as {panel: {label: (steps, values)}}."""
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig

    def record(self, path, **options):
        saved.append(
            {
                axes.get_ylabel(): {
                    line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()
                }
                for axes in self.axes
            }
        )
        savefig(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


def run_folder(tmp_path, name, log=LOG, place="."):
    (tmp_path / name / place).mkdir(parents=True)
    (tmp_path / name / place / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return str(tmp_path / name)


def plot(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["plot_loss.py", *map(str, words)])
    script("plot_loss").main()


def test_picture_shows_what_was_logged(tmp_path, monkeypatch, figures, capsys):
    extra = [{"step": 3, "eval_loss": 1.5}, {"step": 3, "train_tokens_per_second": 900.0}]
    folder = run_folder(tmp_path, "run", [*LOG, *extra])
    plot(monkeypatch, folder)
    assert (tmp_path / "run/training_loss.png").read_bytes().startswith(b"\x89PNG")
    (panels,) = figures
    assert panels["loss"] == {"training": ([1, 2, 3], [3.0, 1.5, 1.0]), "evaluation": ([3], [1.5])}
    assert [len(lines) for lines in panels.values()] == [2, 1, 1]
    assert list(panels) == ["loss", "learning rate", "tokens per second"]
    assert capsys.readouterr().out == f"Wrote {folder}/training_loss.png\n"


def test_several_runs_share_a_picture_with_their_names(tmp_path, monkeypatch, figures):
    folders = [run_folder(tmp_path, name) for name in ("one", "two")]
    plot(monkeypatch, *folders, "--output", tmp_path / "both.png")
    (panels,) = figures
    assert list(panels["loss"]) == ["one training", "two training"] and list(panels["learning rate"]) == ["one", "two"]


def test_loss_that_is_not_a_number_leaves_a_gap(tmp_path, monkeypatch, figures):
    plot(monkeypatch, run_folder(tmp_path, "run", [*LOG, {"step": 4, "loss": math.nan}]))
    steps, values = figures[0]["loss"]["training"]
    assert steps == [1, 2, 3, 4] and math.isnan(values[3])


def test_run_that_goes_on_is_drawn_from_its_newest_checkpoint(tmp_path, monkeypatch, figures):
    folder = run_folder(tmp_path, "run", LOG[:2], "checkpoint-9")
    run_folder(tmp_path, "run", LOG, "checkpoint-10")
    run_folder(tmp_path, "run", LOG[:1], "checkpoint-kept")  # renamed by its owner
    plot(monkeypatch, folder)
    assert figures[0]["loss"]["training"][0] == [1, 2, 3]


@pytest.mark.parametrize(
    "log, sentence",
    [
        (None, "is no folder of a training run: there is no trainer_state.json in it"),
        ([], "holds no loss: the run logged none"),
        ("not a log", "is not a state that Trainer wrote"),
        ([{"step": 1, "loss": None}], "is not a state that Trainer wrote .TypeError"),
        ([{"loss": 1.0}], "is not a state that Trainer wrote .KeyError: 'step'"),
    ],
)
def test_mistakes_get_a_sentence(log, sentence, tmp_path, monkeypatch):
    if log is not None:
        run_folder(tmp_path, "run", log)
    if isinstance(log, str):
        (tmp_path / "run/trainer_state.json").write_text("{}")
    with pytest.raises(SystemExit, match=sentence):
        plot(monkeypatch, tmp_path / "run")


def test_without_matplotlib_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        plot(monkeypatch, run_folder(tmp_path, "run"))


def test_training_draws_its_losses_unless_told_not_to(run, llama, chats, figures):
    flags = ["--model_name_or_path", llama, "--train_file", chats, CHAT_FLAGS, SHORT, "--do_train", "--max_steps", 3]
    folder = run(flags, "--plot_loss")
    assert (folder / "training_loss.png").is_file()
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert figures[0]["loss"]["training"][1] == [entry["loss"] for entry in log if "loss" in entry]
    shutil.rmtree(folder)
    assert not (run(flags) / "training_loss.png").exists() and len(figures) == 1


def test_training_without_matplotlib_or_the_module_says_so_in_one_line(run, llama, chats, monkeypatch, caplog):
    flags = ["--model_name_or_path", llama, "--train_file", chats, CHAT_FLAGS, SHORT, "--do_train", "--max_steps", 1]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    caplog.set_level("INFO", logger="run_chatglm_lora")
    assert not (run(flags, "--plot_loss") / "training_loss.png").exists()
    assert sum("The losses are not drawn" in record.message for record in caplog.records) == 1
