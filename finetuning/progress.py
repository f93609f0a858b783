"""What is seen of a training while it goes on: one bar in a terminal, and a picture of the losses that grows.

The bar holds steps, loss, learning rate, tokens a second and the time left. A log that is no terminal has lines.
"""

import importlib.util
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from . import loss_plot


# Keys of a training's log line, what the bar calls them, and how it writes them.
SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "learning_rate": ("lr", "{:.2e}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}
SHARE_OF_TIME = 0.02  # that the pictures of a run may take while it goes on


def bar_defaults(given) -> dict:
    """Without --disable_tqdm, bars in a terminal only: elsewhere they would fill a file with their every state."""
    return {} if "disable_tqdm" in given else {"disable_tqdm": not sys.stderr.isatty()}


class Progress(ProgressCallback):
    """Trainer's bar, which holds the newest loss instead of pushing a line for each one up the screen.

    Evaluations and the end of the training still have a line of their own.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step  # of a resumed run, whose earlier steps take no time now
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", desc="Training", dynamic_ncols=True
            )
            self.lines = ExitStack()
            self.lines.enter_context(logging_redirect_tqdm())  # log lines above the bar, not through it

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or "loss" not in logs:
            super().on_log(args, state, control, logs, **kwargs)
            return
        shown = {name: form.format(logs[key]) for key, (name, form) in SHOWN.items() if key in logs}
        self.training_bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self.lines.close()


class GrowingPicture(TrainerCallback):
    """Draws training_loss.png anew at evaluations and checkpoints, as often as 2 % of the time allow."""

    drawn, took = 0.0, 0.0  # when the last picture was made, and its seconds

    def on_evaluate(self, args, state, control, **kwargs):
        self.draw(args, state)

    def on_save(self, args, state, control, **kwargs):
        self.draw(args, state)

    def draw(self, args, state):
        began = time.monotonic()
        due = began - self.drawn >= self.took / SHARE_OF_TIME
        if due and args.should_save and any("loss" in entry for entry in state.log_history):
            folder = Path(args.output_dir)
            loss_plot.draw_logs({folder.resolve().name: state.log_history}, folder / loss_plot.PICTURE)
            self.drawn = time.monotonic()
            self.took = self.drawn - began


def show_progress(trainer, plot_loss):
    """Put our bar in the place of Trainer's, where that is one (a notebook has a table), and let the picture grow.

    Trackers (--report_to) hear of a log line last: what our callbacks add to it would escape them.
    """
    for tracker in get_reporting_integration_callbacks(trainer.args.report_to):
        trainer.add_callback(trainer.pop_callback(tracker))
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(Progress())
    if plot_loss and importlib.util.find_spec("matplotlib"):
        trainer.add_callback(GrowingPicture())
