"""What guards a training run: callbacks, signals, failed saves, and the end of a run that was finished before."""

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.data_loader import get_sampler
from datasets import IterableDataset
from safetensors import SafetensorError
from torch.utils.data import get_worker_info
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from .checkpoints import WholeCheckpoints, checkpoints, resume_point, run_settings
from .launching import LateFlag, end_processes
from .training_checks import HopelessRun, TrainingChecks


logger = logging.getLogger("run_chatglm_lora.safeguards")

STOPPED_EARLY = 75  # the exit code: sysexits.h calls it a temporary failure, try again later
SAME_SIGNAL_SECONDS = 3  # launchers and terminals deliver one wish to stop twice


class Safeguards:
    """The callbacks of a training run, made before the model is loaded: --resume_from_checkpoint becomes a path."""

    def __init__(self, model_args, chat_args, lora_args, training_args, train_data, tokenizer):
        settings = run_settings(model_args, chat_args, lora_args, training_args, train_data, tokenizer)
        training_args.resume_from_checkpoint = resume_point(training_args, settings)
        self.checks = TrainingChecks()
        self.stop = StopOnSignal()
        self.checkpoints = WholeCheckpoints(settings)
        # The stop comes before the checks, which look before each save.
        self.callbacks = [StopIfFinished(), SeededOrder(), self.stop, self.checks, self.checkpoints]

    def shielded(self, collator):
        return ShieldedCollator(collator)

    def trained_and_saved(self, trainer) -> dict:
        """Train, save the model or adapter in --output_dir, and return the metrics of the training.

        Raises SystemExit with STOPPED_EARLY after a signal, when a checkpoint is saved; OSError if the disk is full;
        ValueError where no step is made.
        """
        metrics = self.trained(trainer)
        self.save(trainer)
        return metrics

    def trained(self, trainer) -> dict:
        """The metrics of the training; raises what `trained_and_saved` raises."""
        args = trainer.args
        self.checks.trainer = trainer
        if makes_no_step(trainer):
            raise nothing_trained(trainer)
        with self.stop:
            try:
                metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
            except FinishedBefore:
                trainer.is_in_train = False
                if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                    trainer._load_best_model()  # as at the end of a training; it has no public name
                metrics = earlier_metrics(args.output_dir)
            except (OSError, RuntimeError, SafetensorError) as error:
                hopeless = isinstance(error, HopelessRun) or not args.should_save
                if hopeless or not self.checkpoints.remove_half_written():
                    raise
                failed = f"{self.checkpoints.new} could not be written, and is removed: {error}"
                raise OSError(f"{failed}\n{kept(args)}") from error
        if trainer.state.global_step == 0:
            raise nothing_trained(trainer)
        return metrics

    def save(self, trainer):
        """Save the model or adapter in --output_dir, look at it, and leave no half-written file; OSError as above."""
        args = trainer.args
        try:
            trainer.save_model()
        except (OSError, RuntimeError, SafetensorError) as error:
            for path in Path(args.output_dir).glob("*.safetensors") if args.should_save else []:
                path.unlink()
            raise OSError(f"The result could not be written to {args.output_dir}: {error}\n{kept(args)}") from error
        if args.should_save:
            self.checks.check_saved(args.output_dir, trainer.model, trainer.state.global_step)


def makes_no_step(trainer) -> bool:
    """Whether no epoch is asked for, or --dataloader_drop_last leaves no batch; a stream is not counted."""
    args, data = trainer.args, trainer.train_dataset
    if isinstance(data, IterableDataset):
        return False
    batches = len(data) // (args.train_batch_size * args.world_size) if args.dataloader_drop_last else len(data)
    return batches == 0 or (args.max_steps <= 0 and args.num_train_epochs <= 0)


def nothing_trained(trainer) -> ValueError:
    args = trainer.args
    rows = "a stream of" if isinstance(trainer.train_dataset, IterableDataset) else len(trainer.train_dataset)
    return ValueError(
        f"Nothing is trained, and nothing saved: {rows} examples, --per_device_train_batch_size "
        f"{args.per_device_train_batch_size}, --dataloader_drop_last {args.dataloader_drop_last}, "
        f"--num_train_epochs {args.num_train_epochs:g} and --max_steps {args.max_steps} make no step."
    )


def earlier_metrics(output_dir) -> dict:
    path = Path(output_dir, "train_results.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def kept(args) -> str:
    """The end of the message of a failed save: what is left, and the way out."""
    names = ", ".join(folder.name for folder in checkpoints(args.output_dir)) or "no checkpoint"
    free = shutil.disk_usage(args.output_dir).free / 2**20
    return (
        f"{args.output_dir} keeps {names}; {free:,.0f} MiB are free there. Make room "
        "(--save_total_limit keeps fewer checkpoints), then go on with --resume_from_checkpoint last."
    )


class FinishedBefore(Exception):
    """The checkpoint that a run resumes from is its last one."""


class StopIfFinished(TrainerCallback):
    """Trainer would train one step more when it resumes at the last step and that is no end of an epoch."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps > 0:
            logger.warning(f"The run was finished at step {state.global_step}: only its result is written again.")
            raise FinishedBefore


class SeededOrder(TrainerCallback):
    """With --train_sampling_strategy group_by_length, draws the order of each epoch from the seed.

    Trainer draws it from the random state of the moment, which a resumed run does not have: it would see some rows
    twice, and leave others out.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        sampler = get_sampler(train_dataloader)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = torch.Generator().manual_seed(args.seed + int(state.epoch or 0))


@dataclass
class ShieldedCollator:
    """A collator whose data loader workers outlive a first SIGTERM, which torchrun sends to them too.

    The process that they work for could not save its checkpoint without them. A later SIGTERM ends them. Until the
    first rows they have it blocked, from their start on (`StopOnSignal.shield`): torch's own handler would end them.
    """

    collator: Callable

    def __call__(self, rows):
        if get_worker_info() is not None and signal.getsignal(signal.SIGTERM) not in (ignore_once, signal.SIG_DFL):
            signal.signal(signal.SIGTERM, ignore_once)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return self.collator(rows)


class IgnoreOnce:
    """A signal handler that passes over the first signal and what follows at once; a later one ends the process."""

    first = None  # when the first signal came

    def __call__(self, number, frame):
        self.first = self.first or time.monotonic()
        if time.monotonic() - self.first > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


ignore_once = IgnoreOnce()


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGINT: save a checkpoint after the current step and exit with STOPPED_EARLY, on every process.

    Of several processes all stop one step later, when they know of it without waiting for their GPUs. A second
    signal, unless it comes at once, has its usual effect.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self):
        self.first = None  # when the first signal came
        self.agreed = False  # whether any process has got one
        self.process = os.getpid()
        self.usual = {}
        if threading.current_thread() is threading.main_thread():
            self.usual = {number: signal.signal(number, self.note) for number in self.signals}
            if os.name == "posix":
                os.register_at_fork(after_in_child=self.shield)

    def __exit__(self, *error):
        for number, handler in self.usual.items():
            signal.signal(number, handler)
        self.usual = {}

    def shield(self):
        """Block SIGTERM in a process that is forked during the training: a data loader worker."""
        if self.usual:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def note(self, number, frame):
        if os.getpid() != self.process:  # a data loader worker: its end is for the process to decide
            return
        if self.first is None:
            self.first = time.monotonic()
            os.write(2, f"{signal.Signals(number).name}: stopping after this step and its checkpoint\n".encode())
        elif time.monotonic() - self.first > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_any_process = LateFlag(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = self.on_any_process(self.first is not None)
        if self.agreed:
            args.save_only_model = False  # such a checkpoint could not be resumed from
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.agreed:
            logger.warning(
                f"Stopped early, by a signal, after step {state.global_step} of {state.max_steps}. Go on with "
                f"--resume_from_checkpoint last. Exit code {STOPPED_EARLY}."
            )
            end_processes()
            raise SystemExit(STOPPED_EARLY)
