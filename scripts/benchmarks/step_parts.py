"""The parts of a training step on a CPU, with all callbacks of a run, and the time of each."""

import tempfile
from collections import Counter

from torch.profiler import ProfilerActivity, profile, record_function
from transformers import Trainer, TrainerCallback, TrainingArguments

from finetuning import batches
from finetuning.safeguards import StopOnSignal
from finetuning.self_checks import SelfChecks
from finetuning.throughput import Throughput
from finetuning.training_checks import TrainingChecks
from run_chatglm_lora import ChatArguments

from .training import STATIC_LENGTH, adapted, random_model, random_rows


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


class TrainingChecksWithoutText(TrainingChecks):
    """Rows of random ids have no text that could be shown."""

    def on_train_begin(self, args, state, control, **kwargs):
        tokenizer = type("NoText", (), {"decode": staticmethod(lambda ids: "")})
        super().on_train_begin(args, state, control, **{**kwargs, "processing_class": tokenizer})


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


def milliseconds_of_steps(shape: str, count: int, batch_size: int, optim: str | None) -> dict[str, float]:
    """Milliseconds of each part in all of `count` steps; `optim` is a name of Trainer's (None: its default)."""
    model, steps = adapted(random_model(shape, "cpu")), WARM_UP + count
    rows = random_rows(steps * batch_size, model.config)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=batch_size, report_to="none", logging_steps=steps,
            logging_nan_inf_filter=False, save_strategy="no", use_cpu=True, disable_tqdm=True,
            optim=optim or TrainingArguments.default_optim, remove_unused_columns=False,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        chat_args = ChatArguments()
        collator = batches.chat_collator(0, chat_args, args, STATIC_LENGTH)
        profiled, stop = Profiled(), StopOnSignal()
        checks = SelfChecks(collator, {"train": rows}, chat_args, 0, is_pretrained=False)
        callbacks = [checks, *map(marked, (stop, TrainingChecksWithoutText(), Throughput())), profiled]
        trainer = Trainer(model, args, data_collator=collator, train_dataset=rows, callbacks=callbacks)
        with stop:
            trainer.train()
    return shares(profiled.profile.events(), model.config.vocab_size, model.peft_config["default"].r)
