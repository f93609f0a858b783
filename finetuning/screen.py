"""What a person sees of a run: the log, what it was found to be before its first step, and what to do at its end."""

import logging
import shlex
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import peft
import torch
import transformers
from datasets import IterableDataset
from transformers import TrainerCallback

from .batches import example_lengths
from .versions import untested_transformers


logger = logging.getLogger("run_chatglm_lora")
plan_logger = logging.getLogger("run_chatglm_lora.plan")

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"

# Warnings of libraries that say nothing to whoever trains: (category, beginning of the text, why it is harmless here).
HARMLESS_WARNINGS = [
    (FutureWarning, "`is_gradient_checkpointing` is deprecated", "PEFT asks transformers by the old name"),
    (
        FutureWarning,
        r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
        "DeepSpeed calls them by the old names, under ZeRO-3 several times a step",
    ),
    (
        UserWarning,
        r"Adapter '\w+': \d+ LoRA tensor\(s\) have invalid shape",
        "under ZeRO-3 tensors are empty while they are shared out; what was saved is opened and looked at again",
    ),
    (FutureWarning, "`gradient_checkpointing_enable` is deprecated", "the name that all tested releases know"),
    (UserWarning, "'pin_memory' argument is set as true but no accelerator", "Trainer's default, on a CPU"),
]
# The same of their loggers: (logger, part of the text, why it is harmless here).
HARMLESS_MESSAGES = [
    ("transformers.trainer", "tokenizer has new PAD/BOS/EOS tokens", "the ids are the tokenizer's, by intent"),
]


# ------------------------------------------------------------------------------------------------------------ the log


def set_up_logging(training_args):
    """Log to stdout: by default what a person needs, with --log_level info what upstream shows.

    Without --log_level libraries are heard from WARNING on and our own lines stand without time and name. Of several
    processes one speaks, unless --log_level_replica gives the others a level.
    """
    replica = not training_args.should_log
    brief = training_args.log_level == "passive" and not replica
    if replica and training_args.log_level_replica == "warning":
        training_args.log_level_replica = "error"  # Trainer sets transformers' level by it once more
        warnings.simplefilter("ignore")
    level = logging.WARNING if brief else training_args.get_process_log_level()
    handler = logging.StreamHandler(sys.stdout)
    full = logging.Formatter("%(asctime)s - %(levelname)s - %(name)s - %(message)s", "%m/%d/%Y %H:%M:%S")
    handler.setFormatter(Brief() if brief else full)
    logging.basicConfig(handlers=[handler])
    logger.setLevel(logging.INFO if brief else level)
    transformers.utils.logging.set_verbosity(level)
    datasets.utils.logging.set_verbosity(level)
    datasets.utils.logging.disable_propagation()  # it has a handler of its own
    transformers.utils.logging.enable_default_handler()
    if not brief:
        transformers.utils.logging.enable_explicit_format()
    hide_harmless()
    if replica or training_args.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    logger.log(logging.INFO if brief else logging.WARNING, f"{processes(training_args)}; {versions()}")
    if not replica and (sentence := untested_transformers()):
        logger.warning(sentence)
    if not brief:
        logger.info(f"Training arguments: {training_args}")


class Brief(logging.Formatter):
    """A line as it is, and the level and the library before what is more than information."""

    def format(self, record):
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        ours = record.name.partition(".")[0] == logger.name
        return f"{record.levelname}: {text}" if ours else f"{record.levelname} ({record.name}): {text}"


def hide_harmless():
    for category, beginning, _ in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", beginning, category)
    for name, part, _ in HARMLESS_MESSAGES:
        logging.getLogger(name).addFilter(lambda record, part=part: part not in record.getMessage())


def versions() -> str:
    return f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"


def processes(args) -> str:
    """The processes of a run and their devices, in words."""
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    count = f"{args.world_size} processes" if args.world_size > 1 else "1 process"
    return f"{count} on {device}, mixed precision: {precision}"


# ------------------------------------------------------------------------------------------- before the first step


def show_data(data, raw):
    """Log rows, examples and lengths of each split."""
    for split, encoded in data.items():
        if isinstance(encoded, IterableDataset):
            logger.info(f"Data of {split}: a stream")
            continue
        given = f"{len(raw[split])} rows, " if split in raw and not isinstance(raw[split], IterableDataset) else ""
        sizes = example_lengths(encoded)
        lengths = f" of {np.median(sizes):.0f} tokens in the median and {max(sizes)} at most" if len(sizes) else ""
        logger.info(f"Data of {split}: {given}{len(encoded)} examples{lengths}")


def show_model(model):
    """Log class, size, dtype and attention of a model that was loaded."""
    sizes = [getattr(p, "ds_numel", p.numel()) for p in model.parameters()]  # ZeRO-3 leaves the tensors empty
    attention = getattr(model.config, "_attn_implementation", None) or "its own"
    count = f"{sum(sizes) / 1e9:.2f} billion" if sum(sizes) > 1e8 else f"{sum(sizes):,}"
    kind = model.config.model_type
    logger.info(f"Model: {type(model).__name__} ({kind}), {count} weights in {model.dtype}, attention: {attention}")


class Plan(TrainerCallback):
    """Says before the first step how much will be trained, and where it is saved."""

    def on_train_begin(self, args, state, control, train_dataloader, **kwargs):
        steps, size = state.max_steps, args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        dataset = train_dataloader.dataset
        known = isinstance(dataset, datasets.Dataset)
        tokens = f", about {np.mean(example_lengths(dataset)) * size:,.0f} tokens a step" if known else ""
        plan_logger.info(
            f"Training: {steps} steps of {size} examples ({args.train_batch_size} a device, "
            f"{args.gradient_accumulation_steps} batches accumulated){tokens}, learning rate {args.learning_rate:g}"
        )
        strategy = getattr(args.save_strategy, "value", args.save_strategy)
        every = {"steps": f"every {args.save_steps} steps", "epoch": "after each epoch", "best": "when it is better"}
        checkpoints = f", checkpoints {every[strategy]}" if strategy in every else ""
        plan_logger.info(f"Saved to: {args.output_dir}{checkpoints}")


# ----------------------------------------------------------------------------------------------------- after the last


def show_next_steps(output_dir, base):
    """Log, for a folder that holds a model or an adapter for `base`, how to chat, to answer a file, and to merge."""
    script = {name: shlex.quote(str(shown(SCRIPTS / name))) for name in ("chat.py", "predict.sh", "merge_lora.py")}
    out, base = shlex.quote(str(output_dir)), shlex.quote(str(base))
    lines = [f"Chat:     python {script['chat.py']} {out}"]
    if Path(output_dir, "adapter_config.json").is_file():
        lines += [
            f"Predict:  bash {script['predict.sh']} {base} {out} QUESTIONS.jsonl {out}_answers",
            f"Merge:    python {script['merge_lora.py']} {out} {out}_merged",
        ]
    logger.info("\n".join(lines))


def shown(path) -> Path:
    """A path from the working folder where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
