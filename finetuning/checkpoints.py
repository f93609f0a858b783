"""Checkpoints that are known to be whole, and to belong to the run that goes on from them.

Trainer writes a checkpoint file by file. When all of them are there, `complete.json` is added as the last act: names
and sizes of the files, and the settings of the run. A folder without it was cut short, or comes from elsewhere.
"""

import glob
import hashlib
import json
import logging
import os
import re
import shutil
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import IterableDataset
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from .mistakes import named


logger = logging.getLogger("run_chatglm_lora.checkpoints")

MANIFEST = "complete.json"
SAMPLED_ROWS = 256  # of a data set, evenly spaced, make its fingerprint
STREAMED_ROWS = 16  # the first of a stream


# -------------------------------------------------------------------------------------------- settings of a run


class Settings(NamedTuple):
    """The settings of a run, by flag or in words."""

    fixed: dict  # must be the same when the run is resumed
    from_here_on: dict  # may change, which is said


def run_settings(model_args, chat_args, lora_args, training_args, train_data, tokenizer) -> Settings:
    """What a checkpoint is held against when a run resumes from it."""
    adapter = {f"--{name}": value for name, value in vars(lora_args).items() if name in ADAPTER_FLAGS}
    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    question = [{"role": "user", "content": "..."}]
    fixed = {
        "the base model": Path(model_args.model_name_or_path or "from scratch").name,
        "--model_revision": model_args.model_revision,
        "--dtype": model_args.dtype,
        **(adapter if lora_args.use_lora else {"--use_lora": False}),
        **{f"--{name}": getattr(lora_args, name) for name in METHOD_FLAGS},
        **flag_values(training_args, CHANGES_THE_RESULT),
        "--ignore_pad_token_for_loss": chat_args.ignore_pad_token_for_loss,
        "the number of processes": training_args.world_size,
        "--per_device_train_batch_size x --gradient_accumulation_steps": batch,
        "the strategy": strategy(training_args),
        "the prompt format": tokenizer.chat_template
        and tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False),
        "the training data (files, --max_train_samples, length flags, tokenizer)": fingerprint(train_data),
    }
    batches = {"--no_padding_free": chat_args.no_padding_free, "--pad_to_max_length": chat_args.pad_to_max_length}
    return Settings(fixed, flag_values(training_args, FROM_HERE_ON) | batches)


def flag_values(training_args, names) -> dict:
    """Those of the flags that this version of transformers has, with their values as JSON knows them."""
    values = json.loads(json.dumps(training_args.to_dict(), default=str))
    return {f"--{name}": values[name] for name in sorted(names) if name in values}


# fmt: off
ADAPTER_FLAGS = {
    "use_lora", "peft_type", "peft_config", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
    "lora_exclude_modules", "lora_layers_to_transform", "lora_modules_to_save", "lora_bias", "use_rslora", "use_dora",
    "init_lora_weights", "num_virtual_tokens", "pre_seq_len", "prefix_projection", "load_in_4bit", "load_in_8bit",
}
METHOD_FLAGS = ["loraplus_lr_ratio", "train_last_layers", "early_stopping_patience"]
# Each field of TrainingArguments stands in one of three tables; tests/test_checkpoints.py sees to it.
#
# The optimizer and the schedule take these from the checkpoint, so that another value would be passed over without a
# word; or the order of the data and the loss hang on them, and the run would be neither the old one nor a new one.
CHANGES_THE_RESULT = {
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "average_tokens_across_devices", "seed",
    "data_seed", "train_sampling_strategy", "length_column_name", "dataloader_drop_last", "accelerator_config",
    "parallelism_config",
}
# The length of the run, which the schedule stretches to, and what sums are rounded by or streamed rows dealt out by.
FROM_HERE_ON = {
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "auto_find_batch_size", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "use_liger_kernel", "liger_kernel_config", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing", "activation_checkpointing_kwargs", "dataloader_num_workers", "dataloader_in_order",
    "ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism", "fsdp_config", "use_cpu",
    "metric_for_best_model", "greater_is_better", "load_best_model_at_end",
}
# What is logged, evaluated, saved and published, and how data and gradients travel. --deepspeed and --fsdp are
# compared in words, as the strategy.
HARMLESS = {
    "output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank", "deepspeed", "fsdp",
    "torch_empty_cache_steps", "use_cache", "remove_unused_columns", "label_names", "debug", "skip_memory_metrics",
    "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter",
    "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name",
    "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps",
    "eval_delay", "per_device_eval_batch_size", "prediction_loss_only", "eval_on_start", "eval_do_concat_batches",
    "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
    "bf16_full_eval", "fp16_full_eval", "save_only_model", "save_strategy", "save_steps", "save_on_each_node",
    "save_total_limit", "enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id",
    "hub_strategy", "hub_always_push", "hub_revision", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout",
}
# fmt: on


def strategy(training_args) -> str:
    if training_args.deepspeed:
        zero = training_args.hf_deepspeed_config.config.get("zero_optimization", {})
        return f"DeepSpeed ZeRO-{zero.get('stage', 0)}"
    return "FSDP" if training_args.fsdp else "one copy of the model per process"


def fingerprint(data) -> str:
    """Number of rows and hash of the token ids, so that files may move. Of a stream: its first rows."""
    if isinstance(data, IterableDataset):
        rows, size = islice(data, STREAMED_ROWS), "stream"
    else:
        rows = data.select(range(0, len(data), max(1, len(data) // SAMPLED_ROWS)))
        size = f"{len(data)} examples"
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return f"{size}, {digest.hexdigest()[:16]}"


def check_settings(folder, settings):
    """Raise a ValueError if a checkpoint was made with other settings than those of this run; say what may change."""
    for name, before in ((read_manifest(folder) or {}).get("from_here_on") or {}).items():
        now = settings.from_here_on.get(name, before)
        if now != before:
            logger.warning(f"{name} was {before!r} up to {folder.name}, and is {now!r} from here on.")
    for name, before in recorded_settings(folder).items():
        now = settings.fixed.get(name, before)
        if now != before:
            flag = re.match(r"--\w+$", name)
            raise ValueError(
                f"{folder} was made with {name} {before!r}, this run has {now!r}: resume with the old value"
                f"{f' ({name} {before})' if flag else ''}, or start a new run from the checkpoint's weights with "
                f"--adapter_name_or_path {folder} and another --output_dir."
            )


def recorded_settings(folder) -> dict:
    """The settings in the manifest; for a checkpoint from elsewhere, those that its files tell."""
    if manifest := read_manifest(folder):
        return manifest["settings"]
    processes = len(list(folder.glob("rng_state*.pth")))
    known = {"the number of processes": processes}
    path = folder / "adapter_config.json"
    if path.exists():
        adapter = json.loads(path.read_text(encoding="utf-8"))
        names = {"peft_type": "peft_type", "r": "lora_r", "lora_alpha": "lora_alpha", "use_dora": "use_dora"}
        known |= {f"--{flag}": adapter[name] for name, flag in names.items() if name in adapter}
    return known


# ------------------------------------------------------------------------------------------------- what is whole


def read_manifest(folder) -> dict | None:
    """The manifest of a checkpoint, None if there is none that can be read."""
    try:
        manifest = json.loads(Path(folder, MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and {"written", "settings", "files"} <= manifest.keys() else None


def damage(folder) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; None if it is whole."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"has no {MANIFEST}: it was not written to its end, or not by this script"
    for name, size in manifest["files"].items():
        path = Path(folder, name)
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != size:
            return f"has {path.stat().st_size} bytes of {name} instead of {size}"
    return None


def checkpoints(output_dir) -> list[Path]:
    """The checkpoint folders, whole or not, by step."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(folders, key=lambda folder: int(folder.name.split("-")[1]))


def whole_checkpoints(output_dir) -> list[Path]:
    """The whole checkpoints, the newest last: the one written last, also after a run that was started anew."""
    whole = [folder for folder in checkpoints(output_dir) if damage(folder) is None]
    return sorted(whole, key=lambda folder: read_manifest(folder)["written"])  # a stable sort: by step where equal


def files_of(folder) -> dict[str, int]:
    """Sizes of the files of a checkpoint, by relative path."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def mark_as_whole(folder, settings):
    """Write the manifest after everything else has reached the disk, and all of it at once."""
    files = files_of(folder)
    for name in files:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    written = datetime.now(timezone.utc).isoformat()
    manifest = {"written": written, "settings": settings.fixed, "from_here_on": settings.from_here_on, "files": files}
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    partial = folder / f"{MANIFEST}.part"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / MANIFEST)


# ----------------------------------------------------------------------------------------------------- resuming


def resume_point(training_args, settings) -> str | None:
    """The folder that --resume_from_checkpoint means, checked; None to start at the first step.

    A path is taken as it is; True is the newest whole checkpoint; last likewise, but where there is none yet the run
    starts, so that one command serves for the first start and for all restarts. Raises a ValueError that names the
    fault of a checkpoint that cannot be resumed from.
    """
    wish = training_args.resume_from_checkpoint
    if str(wish) in ("None", "False"):
        if training_args.should_save and checkpoints(training_args.output_dir):
            logger.warning(
                f"{training_args.output_dir} holds checkpoints of an earlier run. This one starts anew and writes "
                "over those with the same number; --resume_from_checkpoint last goes on with it."
            )
        return None
    folder = Path(wish)
    if str(wish) in ("True", "last"):
        folder = newest_whole_checkpoint(training_args, needed=str(wish) == "True")
    elif (fault := damage(folder)) and (not folder.is_dir() or Path(folder, MANIFEST).exists()):
        fault = fault if folder.is_dir() else "is no folder"
        raise ValueError(f"--resume_from_checkpoint: {folder} {fault}. Pass last for the newest whole checkpoint.")
    if len({str(each) for each in gather_object([folder])}) > 1:
        raise ValueError("The processes see different checkpoints: --output_dir must be a folder that they share.")
    if folder is None:
        return None
    if missing := missing_states(folder, training_args.world_size):
        raise ValueError(
            f"{folder} cannot be resumed from: it lacks {missing}, and the optimizer would start afresh. For a new "
            f"run from its weights pass --adapter_name_or_path {folder}."
        )
    if read_manifest(folder) is None:
        check_readable(folder)
    check_settings(folder, settings)
    if settings.fixed.get("--peft_type") == "ADALORA":
        raise ValueError(
            f"{folder} cannot be resumed from: AdaLoRA deals its ranks out by what it has seen in all steps before, "
            "which PEFT does not save. Start a new run in another --output_dir."
        )
    logger.info(f"Resuming from {folder}")
    return str(folder)


def newest_whole_checkpoint(training_args, needed) -> Path | None:
    """The newest whole checkpoint; what is passed over is named. ValueError if one is needed and there is none."""
    output_dir = training_args.output_dir
    whole = whole_checkpoints(output_dir)
    for folder in checkpoints(output_dir):
        if folder not in whole:
            logger.warning(f"{folder} {damage(folder)}. It is passed over.")
    if whole:
        return whole[-1]
    if needed:
        raise ValueError(f"--resume_from_checkpoint: {output_dir} holds no whole checkpoint.")
    logger.warning(f"{output_dir} holds no whole checkpoint yet: the run starts at its first step.")
    return None


def missing_states(folder, processes) -> str | None:
    """The first file that a checkpoint lacks for going on exactly, None if it has all of them."""
    random_states = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    optimizer = ["latest"] if list(folder.glob("global_step*")) else ["optimizer*", "scheduler.pt"]
    if len(list(folder.glob("rng_state*.pth"))) not in (0, processes):
        return None  # made by another number of processes, which check_settings names
    patterns = ["trainer_state.json", *optimizer, *random_states]
    return next(
        (name.replace("*", ".pt") for name in patterns if not glob.glob(f"{glob.escape(str(folder))}/{name}")), None
    )


def check_readable(folder):
    """Raise a ValueError for the first file of a checkpoint from elsewhere that was cut short."""
    for path in sorted(folder.iterdir()):
        with named(f"{path} cannot be read: copy the checkpoint again", ValueError, SafetensorError, BadZipFile):
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                safe_open(path, framework="pt")
            elif path.suffix in (".pt", ".pth"):
                ZipFile(path)


def best_checkpoint(state) -> set[Path]:
    return {Path(state.best_model_checkpoint)} if state.best_model_checkpoint else set()


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint that is written to its end, and deletes old ones by --save_total_limit only then.

    Trainer itself deletes before the new one is known to be whole, and counts half ones.
    """

    def __init__(self, settings):
        self.settings = settings
        self.limit = None
        self.new = None  # the folder that a save at this step would make, if it is not there yet

    def on_train_begin(self, args, state, control, **kwargs):
        self.limit, args.save_total_limit = args.save_total_limit, None

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save or (args.save_strategy == SaveStrategy.BEST and control.should_evaluate):
            self.unmark(args, state)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def unmark(self, args, state):
        """A checkpoint of this step that is there already will be written over: from now on it is not whole."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        PartialState().wait_for_everyone()  # another process may be quicker to begin the new one
        self.new = None if folder.exists() else folder
        PartialState().wait_for_everyone()
        if args.should_save and folder.exists():
            logger.warning(f"{folder} is there already, and is written anew.")
            for name in (MANIFEST, "trainer_state.json"):
                Path(folder, name).unlink(missing_ok=True)

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()  # each process has written its random state
        if args.should_save:
            mark_as_whole(Path(args.output_dir, f"checkpoint-{state.global_step}"), self.settings)
            newest = whole_checkpoints(args.output_dir)[-1:]
            self.delete_old(args.output_dir, {*newest, *best_checkpoint(state)})

    def delete_old(self, output_dir, kept):
        """Whole checkpoints, the oldest first, until --save_total_limit are left; the mark of each goes first."""
        whole = whole_checkpoints(output_dir)
        surplus = len(whole) - max(self.limit, len(kept)) if self.limit else 0
        for folder in [folder for folder in whole if folder not in kept][: max(0, surplus)]:
            Path(folder, MANIFEST).unlink()
            shutil.rmtree(folder)

    def on_train_end(self, args, state, control, **kwargs):
        args.save_total_limit = self.limit
        if args.should_save and self.limit == 1 and state.best_model_checkpoint:
            self.delete_old(args.output_dir, best_checkpoint(state))  # as Trainer does: the best alone is left

    def remove_half_written(self) -> bool:
        """Whether a save was under way and failed; if so, the folder that it began is deleted."""
        failed = self.new is not None and self.new.exists() and read_manifest(self.new) is None
        if failed:
            shutil.rmtree(self.new, ignore_errors=True)
        return failed
