"""Curves of training runs as a picture: whatever was logged of losses, accuracy, learning rate and speed."""

import importlib.util
import json
import logging
import math
import os
from pathlib import Path


logger = logging.getLogger("run_chatglm_lora.loss_plot")

PANELS = {  # one under the other; the keys are those of trainer_state.json
    "loss": {"loss": "training", "eval_loss": "evaluation"},
    "accuracy": {"eval_accuracy": "evaluation"},
    "learning rate": {"learning_rate": ""},
    "tokens per second": {"tokens_per_second": "", "train_tokens_per_second": ""},
}
PICTURE = "training_loss.png"


def log_of(folder: str | os.PathLike) -> list[dict]:
    """The log of a run: of its trainer_state.json or, while it is not there yet, of the newest checkpoint's.

    Raises ValueError if there is none, or nothing in it.
    """
    checkpoints = Path(folder).glob("checkpoint-*/trainer_state.json")
    steps = {path: path.parent.name.rpartition("-")[2] for path in checkpoints}
    numbered = {path: int(step) for path, step in steps.items() if step.isdecimal()}  # others a user has renamed
    newest = sorted(numbered, key=numbered.get, reverse=True)
    path = next((path for path in (Path(folder, "trainer_state.json"), *newest) if path.is_file()), None)
    if path is None:
        raise ValueError(f"{folder} is no folder of a training run: there is no trainer_state.json in it.")
    try:
        log = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        losses = [float(entry[key]) for entry in log for key in PANELS["loss"] if key in entry and entry["step"] >= 0]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a state that Trainer wrote ({type(error).__name__}: {error}).") from error
    if not losses:
        raise ValueError(f"{path} holds no loss: the run logged none (see --logging_steps).")
    return log


def curve(log: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the log entries that have `key`; what is not finite leaves a gap."""
    points = [(entry["step"], entry[key]) for entry in log if key in entry]
    return [step for step, _ in points], [value if math.isfinite(value) else math.nan for _, value in points]


def draw(folders: list[str | os.PathLike], path: str | os.PathLike):
    """Write the curves of one or several runs to a PNG file, with a panel for whatever was logged in any of them.

    Raises ValueError for a folder without a log, ImportError without matplotlib.
    """
    logs = {str(folder): log_of(folder) for folder in folders}
    names = {folder: Path(folder).resolve().name for folder in logs}
    if len(set(names.values())) < len(names):
        names = {folder: folder for folder in logs}
    draw_logs({names[folder]: log for folder, log in logs.items()}, Path(path))


def draw_logs(logs: dict[str, list[dict]], path: Path):
    """Write the curves of logs, by the names of their runs; the file is whole at every moment."""
    from matplotlib.figure import Figure  # without pyplot, no screen is asked for

    keys = {key for log in logs.values() for entry in log for key in entry}
    panels = {title: [key for key in curves if key in keys] for title, curves in PANELS.items()}
    panels = {title: shown for title, shown in panels.items() if shown}
    figure = Figure(figsize=(7, 1.4 + 2.6 * len(panels)), layout="constrained")
    for axes, (title, shown) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for number, (name, log) in enumerate(logs.items()):
            for key in shown:
                steps, values = curve(log, key)
                if steps:
                    parts = [name] if len(logs) > 1 else []
                    label = " ".join([*parts, PANELS[title][key]]).strip()
                    style = {"linestyle": "--", "marker": "."} if key.startswith("eval_") else {}
                    axes.plot(steps, values, label=label or None, color=f"C{number}", **style)
        axes.set(ylabel=title)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    axes.set(xlabel="step")
    if len(logs) == 1:
        figure.suptitle(*logs)
    new = path.with_name(f".{path.name}.new")
    figure.savefig(new, dpi=110, format="png")
    new.replace(path)


def draw_losses(trainer):
    """Write training_loss.png into the output folder; a machine without matplotlib does without, and says so."""
    folder = Path(trainer.args.output_dir)
    if not importlib.util.find_spec("matplotlib"):
        logger.info("The losses are not drawn: that needs matplotlib.")
    elif trainer.is_world_process_zero() and any("loss" in entry for entry in trainer.state.log_history):
        draw([folder], folder / PICTURE)
