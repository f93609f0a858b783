"""Before and after a run: mistakes in launching it that no library reports, the output folder, the process group."""

import atexit
import logging
import os
import socket
import tempfile
from pathlib import Path

import psutil
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from filelock import FileLock, Timeout
from torch import distributed

from .mistakes import did_you_mean


logger = logging.getLogger("run_chatglm_lora.launching")

LOOKS = {"dry_run", "preview", "preview_html"}  # flags of a run that ends before a model is loaded
FOR_ACCELERATORS = {"deepspeed", "fsdp", "fsdp_config", "tf32", "torch_compile"}  # and for launchers
LOCK = "training.lock"
HOLDER = "_training_process"  # who holds it, for people; the hub is not sent what begins with an underscore
LONGEST_ORPHAN = 6  # seconds; data loader workers, which share the lock, look every 5 whether their process lives
# Sections of a DeepSpeed configuration that its module of constants does not name.
# fmt: off
DEEPSPEED_SECTIONS = {
    "activation_checkpointing", "aio", "amp", "autotuning", "checkpoint_engine", "comet", "comms_logger", "compile",
    "compression_training", "csv_monitor", "data_efficiency", "eigenvalue", "elasticity", "flops_profiler",
    "fp32_allreduce", "graph_harvesting", "hybrid_engine", "load_universal_checkpoint", "monitor_config", "nebula",
    "pipeline", "progressive_layer_drop", "quantize_training", "sequence_parallel_size", "sparse_attention",
    "sparse_gradients", "tensor_parallel", "tensorboard", "timers", "wandb", "weight_quantization", "zenflow",
    "zero_optimization",
}
# fmt: on
held_lock = None  # of the output folder, as long as the process lives


def prepared_words(words) -> list[str]:
    """The command line, with True after a bare --resume_from_checkpoint; every pickle is loaded without code from now.

    Raises what `check_launcher` does.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed asks torch.load for the contrary
    check_launcher({word.split("=")[0].removeprefix("--") for word in words})
    complete = []
    for word, after in zip(words, [*words[1:], "--"], strict=False):
        bare = word == "--resume_from_checkpoint" and after.startswith("--")
        complete += [word, "True"] if bare else [word]
    return complete


def check_launcher(flags):
    """Raise a ValueError if DeepSpeed is not started by a launcher: it would ask for mpi4py.

    A run that only looks needs neither.
    """
    asked = {
        "--deepspeed": "deepspeed" in flags and not LOOKS & flags,
        "ACCELERATE_USE_DEEPSPEED": parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"),
    }
    if any(asked.values()) and not {"RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"} & os.environ.keys():
        name = next(name for name, is_asked in asked.items() if is_asked)
        raise ValueError(f"{name} needs a launcher: start with torchrun --nproc_per_node 1 (or as many as GPUs).")


def on_one_processor(given) -> dict:
    """The flags that were given; where the run only looks, without those that need accelerators or a launcher."""
    check_launcher(given.keys())  # a file of arguments may ask for DeepSpeed, too
    if not LOOKS & given.keys():
        return given
    return {**{name: value for name, value in given.items() if name not in FOR_ACCELERATORS}, "use_cpu": True}


def check_launch(args):
    """Raise a ValueError for what would run in another way than it was asked for, or could not save its result."""
    check_processes(args)
    check_strategy(args)
    if args.deepspeed:
        check_deepspeed(args.hf_deepspeed_config.config)
        check_extension_locks()
        allow_deepspeed_states()
        if args.use_cpu:
            join_deepspeed()
    if args.should_save:
        claim_folder(Path(args.output_dir), lock=args.do_train)


def check_processes(args):
    """Raise a ValueError if a launcher started several processes, each of which would train alone."""
    counts = {
        name: int(os.environ.get(name) or 1)
        for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    }
    name = max(counts, key=counts.get)
    if args.world_size > 1 or counts[name] == 1:
        return
    way_out = "on CPUs add --use_cpu" if name == "WORLD_SIZE" else "start them with torchrun"
    raise ValueError(
        f"{name}={counts[name]}, but this process knows of no other: each would train alone and write into "
        f"{args.output_dir}. Processes that train together: {way_out}."
    )


def check_strategy(args):
    """Raise a ValueError if FSDP or fp16 was asked for where it is passed over or does not exist."""
    fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if fsdp and (args.device.type == "cpu" or args.parallel_mode.value != "distributed"):
        raise ValueError(
            f"--fsdp would be passed over: it needs accelerators and a launcher, and this is {args.device} with "
            f"{args.world_size} process. Start with torchrun on GPUs, or drop the flag."
        )
    if (args.fp16 or args.fp16_full_eval) and args.device.type == "cpu":
        raise ValueError("--fp16 needs a GPU: use --bf16, or neither for float32.")


def check_parallelism(args):
    """Raise a ValueError where rows of conversations would be cut into shares, by TrainingArguments or accelerate."""
    config = args.parallelism_config
    if config is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        config = ParallelismConfig()
    if config and (config.cp_enabled or config.sp_enabled):
        raise ValueError(
            f"Context and sequence parallelism (cp_size {config.cp_size}, sp_size {config.sp_size}) give each process "
            "a share of every row, and batches of conversations name positions of whole rows: set both to 1, and use "
            "--gradient_checkpointing for rows that do not fit."
        )


def check_deepspeed(config):
    """Raise a ValueError that names keys of a DeepSpeed configuration which DeepSpeed would pass over."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    levels = {
        "": (config, DEEPSPEED_SECTIONS | {str(v) for name, v in vars(constants).items() if name.isupper()}),
        "zero_optimization.": (
            config.get("zero_optimization", {}),
            fields.keys() | {field.alias for field in fields.values() if field.alias},
        ),
    }
    for prefix, (section, known) in levels.items():
        for key in section.keys() - known:
            near = did_you_mean(f"{prefix}{key}", [f"{prefix}{name}" for name in known])
            raise ValueError(f"--deepspeed: DeepSpeed has no key '{prefix}{key}' and would pass over it.{near}")


def check_extension_locks():
    """Raise a ValueError if a process was killed while it compiled an extension of DeepSpeed.

    Its lock stays, and every later process that needs the extension waits for it to go, without a word and for ever.
    The process that holds a lock has the file open.
    """
    from torch.utils.cpp_extension import get_default_build_root

    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if not list(folder.rglob("*.so")):
        logger.warning(f"DeepSpeed may compile extensions into {folder} now: that takes minutes, once.")
    for lock in folder.rglob("lock"):
        if owner := process_with(lock):
            logger.warning(f"Process {owner} compiles an extension of DeepSpeed in {lock.parent}: waiting for it.")
        elif lock.exists():  # it has not just been given up
            raise ValueError(
                f"{lock} is held by no process of this machine: one was killed while it compiled an extension, and "
                "DeepSpeed would wait for it for ever. Delete that file, unless another machine compiles there now."
            )


def process_with(path: Path) -> int | None:
    """The id of a process of this machine that has the file open; None without one that can be seen."""
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == path.resolve() for file in process.open_files()):
                return process.pid
        except psutil.Error:  # ended meanwhile, or of another user
            continue
    return None


def allow_deepspeed_states():
    """Let torch read the four plain classes that DeepSpeed's checkpoints hold beside tensors, and no others."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


def join_deepspeed():
    """Tell DeepSpeed of the processes before a model is loaded: on CPUs nobody does, and ZeRO-3 would count one."""
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def claim_folder(folder, lock):
    """Make sure that the output folder can be written to and, for training, that no other process trains into it."""
    global held_lock
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written to ({error}): choose another folder.") from error
    if not lock:
        return
    held_lock = FileLock(folder / LOCK, timeout=LONGEST_ORPHAN)
    try:
        held_lock.acquire()
        (folder / HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        atexit.register(release_folder)  # also where the run fails
    except Timeout as error:
        holder = (folder / HOLDER).read_text(encoding="utf-8") if (folder / HOLDER).exists() else "it"
        raise ValueError(
            f"Another process trains into {folder}: {holder} holds {LOCK}. Choose another --output_dir, or end it. "
            "Processes that should train together are started by torchrun."
        ) from error
    except (OSError, NotImplementedError) as error:
        held_lock = None
        logger.warning(f"{folder} does not support locks ({error}): see to it that one run at a time writes there.")


def on_any_process(*flags: torch.Tensor, device) -> list[bool]:
    """Which of the flags, tensors of one bool, are true on at least one process."""
    both = torch.stack([flag.reshape(()).to(device, torch.int32) for flag in flags])  # [number of flags]
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(both, distributed.ReduceOp.MAX)
    return both.bool().tolist()


class LateFlag:
    """Whether a flag is up on any process, as of the call before: so that none waits for what its GPU has to do."""

    def __init__(self, device):
        self.device, self.host, self.copied = device, None, None

    def __call__(self, flag: bool) -> bool:
        if not (distributed.is_available() and distributed.is_initialized()):
            return flag
        if self.copied:
            self.copied.synchronize()  # of the step before, which is over or nearly so
        before = bool(self.host)
        shared = torch.full((), float(flag), device=self.device)  # filled there: no copy from the host
        distributed.all_reduce(shared, distributed.ReduceOp.MAX)
        self.host = shared.to("cpu", non_blocking=True)
        if self.device.type != "cpu":
            self.copied = torch.Event(self.device)
            self.copied.record()
        return before


def release_folder():
    """Let go of the output folder, and leave no trace of having held it."""
    global held_lock
    if held_lock is not None:
        held_lock.release()
        for name in (LOCK, HOLDER):
            Path(held_lock.lock_file).with_name(name).unlink(missing_ok=True)
        held_lock = None


def end_processes():
    """Leave the process group together. Without it one run in four under gloo aborts after its work is done."""
    release_folder()
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
