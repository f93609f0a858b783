"""How fast a training is, and what of it is work on real tokens: in every log line, and in train_results.json."""

import sys
import time

import psutil
import torch
from transformers import TrainerCallback

from .batches import IGNORE_INDEX


try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None


class Throughput(TrainerCallback):
    """Counts the tokens of every training batch, on its device, and gives the rates since the last log line.

    `trained_tokens_per_second` are tokens with a label, over all processes; `padding_share` is the part of all
    computed tokens that is padding; `peak_memory_gib` is that of the first GPU, or of the process. `loss_function` is
    the module that Trainer gives the labels to in place of the model, if any.
    """

    def __init__(self, loss_function=None):
        self.loss_function = loss_function

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.counts = torch.zeros(3, dtype=torch.int64, device=args.device)  # trained, real and computed tokens
        self.total, self.began = self.counts.clone(), time.perf_counter()
        self.last = self.began
        self.hooks = [model.register_forward_pre_hook(self.count, with_kwargs=True)]
        if self.loss_function:
            self.hooks.append(self.loss_function.register_forward_pre_hook(self.count_labels))

    def count(self, model, args, inputs):
        self.in_training = model.training
        if model.training:
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            if "labels" in inputs:
                self.counts[0] += labelled(inputs["labels"])
            self.counts[1] += ids.numel() if mask is None else mask.sum()
            self.counts[2] += ids.numel()

    def count_labels(self, loss_function, args):
        if self.in_training:
            self.counts[0] += labelled(args[1])

    def on_log(self, args, state, control, logs, **kwargs):
        """Add the rates to a training's log line and, in the last one, those of the whole run."""
        last = "train_runtime" in logs
        if "loss" not in logs and not last:
            return
        counts, now = over_processes(self.counts), time.perf_counter()
        self.total, self.counts = self.total + counts, torch.zeros_like(counts)
        if last:
            added = {f"train_{name}": value for name, value in rates(self.total, now - self.began).items()}
        else:
            added = rates(counts, now - self.last)
        self.last = now
        logs.update(added)  # Trainer puts the last of these into train_results.json
        state.log_history[-1].update(added)

    def on_train_end(self, args, state, control, **kwargs):
        while self.hooks:
            self.hooks.pop().remove()


def labelled(labels) -> torch.Tensor:
    """How many labels [B, N] are trained; the first of a row is for nobody."""
    return (labels[:, 1:] != IGNORE_INDEX).sum()


def over_processes(counts):
    """The sum of every process's counts."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return counts


def rates(counts, seconds) -> dict:
    trained, real, computed = counts.tolist()
    return {
        "trained_tokens_per_second": round(trained / seconds, 1),
        "tokens_per_second": round(real / seconds, 1),
        "padding_share": round(1 - real / computed, 4) if computed else 0.0,
        "peak_memory_gib": round(peak_memory() / 2**30, 3),
    }


def peak_memory() -> int:
    """Bytes: the most that the GPU had allocated, or that the process had resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
