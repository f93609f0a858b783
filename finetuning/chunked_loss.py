"""A training's loss without the logits of all positions: memory that is flat in the vocabulary, for any causal model.

Shapes: B rows, S positions, H hidden size, V vocabulary rows.
"""

import inspect
import math
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import pad

from .batches import IGNORE_INDEX, base_of


PROBED = 100.0  # the size of the numbers that stand for logits: a cap, mostly 30, bends them
ROUNDING = 4  # eps of the logits' dtype, which a factor costs


class ChunkedLoss:
    """The `loss_function` of a model of transformers that gets states [B, S, H] where it expects logits [B, S, V].

    In a training step the model's output layer is an Identity, and its turn comes here, for few labelled positions at
    a time. A model that multiplies its logits by a constant does so with the states, which is the same. Everything
    else, such as a cap of the logits, is for `why_whole` to find. In evaluation nothing changes.
    """

    def __init__(self, model):
        self.model, self.base = model, base_of(model)
        self.layer, self.whole = self.base.get_output_embeddings(), self.base.loss_function
        self.in_use = False  # whether states stand for logits in the pass that is under way
        self.chosen = False  # whether its positions are those with a label: rows end to end

    def use(self):
        """Compute the losses of all later training steps in chunks."""
        self.base.loss_function = self
        # PEFT calls the forward of the model in it, not the model: its hooks would not run.
        self.model.register_forward_pre_hook(self.begin, with_kwargs=True)
        self.model.register_forward_hook(self.end, always_call=True)

    def begin(self, model, args, inputs):
        if model.training and inputs.get("labels") is not None:
            self.chosen = "logits_to_keep" in inputs and len(inputs["labels"]) == 1
            self.defer()

    def end(self, model, args, output):
        """The output without what stands for the logits."""
        if self.in_use:
            self.restore()
            return output and type(output)(**{name: value for name, value in output.items() if name != "logits"})

    def defer(self):
        self.in_use = True
        self.base.set_output_embeddings(nn.Identity())

    def restore(self):
        self.in_use = False
        self.base.set_output_embeddings(self.layer)

    def __call__(self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=IGNORE_INDEX, **others):
        if not self.in_use:
            given = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
            return self.whole(logits, labels, vocab_size, **given, **others)
        # Late: the package registers its classes, and a checkpoint with code of its own is loaded without them.
        from chatglm.language_model import causal_lm_loss

        targets = others.get("shift_labels")
        if targets is None:
            targets = pad(labels, (0, 1), value=ignore_index)[:, 1:]
        targets = targets.view(logits.shape[:-1])
        return causal_lm_loss(logits, targets, self.layer, num_items_in_batch, ignore_index, self.chosen)


def why_whole(probe, batch, args) -> str | None:
    """Why the loss of a model (a self_checks.Probe) needs whole logits, tried on a batch; None where it does not.

    The loss in chunks must be the whole one, to rounding. That alone would not show a cap of the logits in a model
    with new weights, whose logits are small: so random numbers of a trained model's size are put in their place, and
    must reach the loss as they are, or all times a constant.
    """
    base = probe.base
    if "skip_logits" in inspect.signature(base.forward).parameters:  # ours, and those that Liger has patched
        return "it makes no logits in training"
    if args.label_smoothing_factor:
        return "--label_smoothing_factor"
    if args.torch_compile:
        return "--torch_compile"
    if args.fsdp or args.n_gpu > 1:
        return "the model is in shards" if args.fsdp else "one process for several GPUs"
    if base.get_output_embeddings() is None:
        return "no output layer is known"
    made, received = probed_logits(probe, batch)
    if len(made) != len(received) or not made:
        return "the model does not compute its loss with its loss_function"
    layer = base.get_output_embeddings()
    changes = (why_changed(*pair, layer) for pair in zip(made, received, strict=True))
    return next((why for why in changes if why), None) or why_other_loss(probe, batch)


def probed_logits(probe, batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random numbers put in the place of the output layer's logits, and what of them reaches the loss."""
    made, received = [], []

    def replaced(layer, args, logits):
        made.append(torch.randn_like(logits) * PROBED)
        return made[-1]

    def recorded(logits, *args, **kwargs):
        received.append(logits)
        return logits.new_zeros(())

    handle = probe.base.get_output_embeddings().register_forward_hook(replaced)
    try:
        with other_loss(probe.base, recorded):
            probe.forward(batch)
    finally:
        handle.remove()
    return made, received


def why_changed(made, received, layer) -> str | None:
    """Why states cannot take the place of logits, made [.., V], that reach the loss as others; None if they can."""
    if made.shape != received.shape:
        return f"the model makes logits {list(received.shape)} of {list(made.shape)}"
    rounding = ROUNDING * torch.finfo(made.dtype).eps
    made, received = made.double().flatten(), received.double().flatten()
    factor = made.dot(received) / made.dot(made)
    if not (received - factor * made).norm() <= rounding * received.norm():
        return "the model does more with its logits than to scale them"
    biased = any(name.endswith("bias") for name, _ in layer.named_parameters())
    if biased and not math.isclose(factor, 1, rel_tol=rounding):
        return "the model scales logits that have a bias"


def why_other_loss(probe, batch) -> str | None:
    """Why the loss in chunks is not the whole one, on a batch; None if it is."""
    whole = probe.forward(batch).loss.item()
    chunked = ChunkedLoss(probe.model)
    with other_loss(probe.base, chunked):
        chunked.defer()
        try:
            loss = probe.forward(batch).loss.item()
        finally:
            chunked.restore()
    if not abs(loss - whole) <= probe.bound() * abs(whole):
        return f"the loss in chunks is {loss:.4f}, and {whole:.4f} whole"


@contextmanager
def other_loss(model, function):
    """The model with another loss_function."""
    own, model.loss_function = model.loss_function, function
    try:
        yield
    finally:
        model.loss_function = own
