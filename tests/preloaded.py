"""What the process has imported from which scripts are forked: the libraries, and nothing of ours."""

import contextlib

import datasets  # noqa: F401
import evaluate  # noqa: F401
import peft  # noqa: F401
import torch
from transformers import Trainer  # noqa: F401


torch.set_num_threads(1)

with contextlib.suppress(ImportError):  # it is for Linux alone
    import deepspeed

    # The library that DeepSpeed adds up on CPUs with, if it may: compiling it takes two minutes of CPU time.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
