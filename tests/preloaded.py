"""What the process has imported from which scripts are forked: the libraries, and nothing of ours."""

import datasets  # noqa: F401
import evaluate  # noqa: F401
import peft  # noqa: F401
import torch
from transformers import Trainer  # noqa: F401


torch.set_num_threads(1)
