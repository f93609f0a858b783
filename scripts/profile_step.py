#!/usr/bin/env python
"""Say where the time of a training step on a CPU goes: docs/performance.md has a table of it.

    python scripts/profile_step.py [--shape tiny] [--steps 5] [--batch_size 8] [--optim adamw_torch]

The model, its adapter and its rows are those of scripts/benchmark.py (way `ours`), with all callbacks of a run. Each
operation counts where it was called from or, failing that, by its shapes: the head has the vocabulary among them,
LoRA's small matrices the rank. What is no operation is Python: Trainer, modules, autograd.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import benchmark
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Trainer, TrainerCallback, TrainingArguments

from finetuning.safeguards import StopOnSignal
from finetuning.self_checks import SelfChecks
from finetuning.throughput import Throughput
from finetuning.training_checks import TrainingChecks


OURS = "ours: "
WARM_UP = 2  # steps that are not looked at


def named(function, name):
    def recorded(*args, **kwargs):
        with record_function(OURS + name):
            return function(*args, **kwargs)

    return recorded


def marked(callback):
    """A callback whose methods, hooks among them, are known by name in the profile."""
    for name in vars(type(callback)):
        if name.startswith(("on_step", "on_pre", "note", "count", "look")):
            setattr(callback, name, named(getattr(callback, name), f"{type(callback).__name__}.{name}"))
    return callback


class Profiled(TrainerCallback):
    """The profile of the steps after the warm-up."""

    def __init__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.profile.start()
            self.whole = record_function("all steps")
            self.whole.__enter__()

    def on_train_end(self, args, state, control, **kwargs):
        self.whole.__exit__(None, None, None)
        self.profile.stop()


def ancestors(event):
    while event is not None:
        yield event.name
        event = event.cpu_parent


def part_of(event, vocabulary, rank) -> str:
    """Which line of the table an operation belongs to."""
    names = list(ancestors(event))
    sizes = {size for shape in event.input_shapes for size in shape if isinstance(size, int)}
    if any(name.startswith(OURS) for name in names):
        return "our checks and counters"
    if any(name.startswith("Optimizer.") for name in names):
        return "optimizer"
    if vocabulary in sizes:
        return "head and loss"
    if any("attention" in name.lower() for name in names):
        return "attention (sdpa)"
    if rank in sizes:
        return "LoRA's small matrices"
    return "rest of the layers" if event.name.startswith("aten::") else "Python: Trainer, modules, autograd"


def shares(events, vocabulary, rank) -> dict[str, float]:
    """Milliseconds of each part."""
    parts = Counter()
    for event in events:
        parts[part_of(event, vocabulary, rank)] += event.self_cpu_time_total / 1000
    return dict(parts.most_common())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=benchmark.SHAPES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--optim", default=TrainingArguments.default_optim)
    options = parser.parse_args()
    model = benchmark.adapted(benchmark.random_model(options.shape, "cpu"))
    vocabulary, steps = model.config.vocab_size, WARM_UP + options.steps
    rows = benchmark.random_rows(steps * options.batch_size, model.config)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            Path(folder), max_steps=steps, per_device_train_batch_size=options.batch_size, optim=options.optim,
            report_to="none", logging_steps=steps, logging_nan_inf_filter=False, save_strategy="no", use_cpu=True,
            disable_tqdm=True, remove_unused_columns=False, train_sampling_strategy="sequential",
        )  # fmt: skip
        chat_args = benchmark.ChatArguments()
        collator = benchmark.batches.chat_collator(0, chat_args, args, benchmark.STATIC_LENGTH)
        profiled, stop = Profiled(), StopOnSignal()
        checks = SelfChecks(collator, {"train": rows}, chat_args, 0, is_pretrained=False)
        callbacks = [checks, *map(marked, (stop, TrainingChecksWithoutText(), Throughput())), profiled]
        trainer = Trainer(model, args, data_collator=collator, train_dataset=rows, callbacks=callbacks)
        with stop:
            trainer.train()
    parts = shares(profiled.profile.events(), vocabulary, model.peft_config["default"].r)
    whole = sum(parts.values())
    print(f"| part | ms a step | share |\n|---|---|---|\n| all | {whole / options.steps:.1f} | |")
    for name, milliseconds in parts.items():
        print(f"| {name} | {milliseconds / options.steps:.2f} | {milliseconds / whole:.1%} |")


class TrainingChecksWithoutText(TrainingChecks):
    """Rows of random ids have no text that could be shown."""

    def on_train_begin(self, args, state, control, **kwargs):
        tokenizer = type("NoText", (), {"decode": staticmethod(lambda ids: "")})
        super().on_train_begin(args, state, control, **{**kwargs, "processing_class": tokenizer})


if __name__ == "__main__":
    main()
