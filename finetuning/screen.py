"""What a person sees of a run: the log."""

import logging
import sys

import datasets
import peft
import torch
import transformers


logger = logging.getLogger("run_chatglm_lora")


def set_up_logging(training_args):
    """Log to stdout at one level for the script, datasets and transformers; replicas stay quiet."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        stream=sys.stdout,
    )
    if training_args.should_log:
        transformers.utils.logging.set_verbosity_info()  # makes the default level, "passive", mean INFO
    level = training_args.get_process_log_level()
    logger.setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    datasets.utils.logging.disable_propagation()  # it has a handler of its own
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()
    distributed = training_args.parallel_mode.value == "distributed"
    logger.warning(
        f"process {training_args.local_process_index} on {training_args.device}, {training_args.n_gpu} GPUs, "
        f"distributed: {distributed}, fp16: {training_args.fp16}, bf16: {training_args.bf16}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    )
    logger.info(f"Training arguments: {training_args}")
