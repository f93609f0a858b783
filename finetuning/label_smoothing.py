"""The loss with --label_smoothing_factor, for labels of every kind of batch.

Trainer's own smoother shifts labels only for the classes of transformers' table; with any other, ChatGLM among them,
each position would learn to repeat its own token.
"""

import torch
from torch.nn.functional import cross_entropy

from .batches import IGNORE_INDEX


class SmoothedCrossEntropy(torch.nn.Module):
    """Trainer's `compute_loss_func`. It is a module so that the log and the checks can hook onto it, as on the model.

    Trainer takes the labels away from the model that it computes a loss of its own for.
    """

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        """The summed loss over `num_items_in_batch`, or its mean over the labels; `labels` [B, N] is ahead by one.

        (1 - factor) x cross entropy + factor x mean over the vocabulary of -log p (Szegedy et al., 2015).
        """
        logits = outputs["logits"][:, -labels.shape[1] :]  # [B, N, V], without the virtual tokens of a trained prompt
        targets = labels[:, 1:]
        trained = targets != IGNORE_INDEX
        scored, targets = logits[:, :-1][trained].float(), targets[trained]  # [T, V], [T]
        total = cross_entropy(scored, targets, reduction="sum", label_smoothing=self.factor)
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / (len(targets) if num_items_in_batch is None else num_items_in_batch)


def loss_options(training_args) -> dict:
    """What Trainer is given for --label_smoothing_factor; nothing without it, when the model computes its loss."""
    factor = training_args.label_smoothing_factor
    return {"compute_loss_func": SmoothedCrossEntropy(factor)} if factor else {}
