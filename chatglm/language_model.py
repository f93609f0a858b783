"""What the language models of all generations share: their forward with the loss, and the trained prefix.

Shapes: B batch, S tokens, H hidden size, V vocabulary rows, L layers, g key/value heads, d head size, P states of a
trained prefix.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import TransformersKwargs, can_return_tuple

from .library_names import CACHE, takes_cache


LOSS_ROWS = 512  # positions whose logits exist at once: 310 MB in float32 for the largest vocabulary, GLM-4's
PREFIX_DROPOUT = 0.1
TRAINED_WITH_PREFIX = ("prefix_encoder.", "classifier_head.")


class PassedOn(TransformersKwargs, total=False):
    """What a forward takes besides its parameters and hands on to the attention: the library's keywords and these."""

    return_dict: bool | None
    use_cache: bool | None  # for a layer, which drops its cache where it is checkpointed
    row_ends: list[int]  # of rows laid end to end, for an attention of one's own (AttentionInterface)
    # Continuous batching, in 5.17 to 5.24:
    cache: object  # the paged one, up to 5.23
    read_index: list[torch.Tensor]
    write_index: list[torch.Tensor]
    block_table: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    logits_indices: torch.Tensor
    logits_processor_args: torch.Tensor


def refuse_unknown(keywords: dict[str, Any], owner: nn.Module):
    """TypeError for a keyword that nobody reads; without it a cache, a mask or positions under a new name get lost.

    A `Cache` here is one that did not come by its name, whatever its name.
    """
    for name, value in keywords.items():
        if value is not None and (name not in PassedOn.__optional_keys__ or isinstance(value, Cache)):
            raise TypeError(f"{type(owner).__name__}.forward() got an unexpected keyword argument {name!r}")


def summed_cross_entropy(
    states: torch.Tensor, targets: torch.Tensor, ignore_index: int, output_layer: nn.Module
) -> torch.Tensor:
    logits = output_layer(states).float()
    return nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")


class SummedCrossEntropy(torch.autograd.Function):
    """Cross entropy summed over positions, whose gradients are made with the value, `LOSS_ROWS` positions at a time.

    So neither logits nor probabilities are kept for the backward pass. `weights` are those of the output layer that
    are trained. Shapes: states [N, H], targets [N], output_layer [.., H] -> [.., V].
    """

    @staticmethod
    def forward(
        ctx,
        states: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int,
        output_layer: nn.Module,
        *weights: torch.Tensor,
    ):
        total, by_states = 0, []
        by_weights = [torch.zeros_like(weight) for weight in weights]
        for rows, labels in zip(states.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True):
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                logits = output_layer(rows)
            # The gradient of the logits is their probabilities, less 1 at the target. Made in the place of the
            # logarithms it costs one pass over [N, V] where autograd takes three.
            change = nn.functional.log_softmax(logits.detach().float(), dim=-1)
            counted = labels != ignore_index  # [LOSS_ROWS]
            targeted = (torch.arange(len(labels), device=labels.device), labels * counted)
            total = total - (change[targeted] * counted).sum()
            change.exp_()[targeted] -= 1
            if weights:
                change *= counted[:, None]
            by_rows, *added = torch.autograd.grad(
                logits, (rows, *weights), change.to(logits.dtype), materialize_grads=True
            )
            by_states.append(by_rows * counted[:, None])
            for gradient, more in zip(by_weights, added, strict=True):
                gradient += more
        ctx.save_for_backward(torch.cat(by_states), *by_weights)
        return total

    @staticmethod
    def backward(ctx, scale: torch.Tensor):
        by_states, *by_weights = (gradient * scale for gradient in ctx.saved_tensors)
        return by_states, None, None, None, *by_weights


@torch.compiler.disable  # the number of labelled positions is another one in every batch
def causal_lm_loss(
    states: torch.Tensor,
    targets: torch.Tensor,
    output_layer: nn.Module,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    chosen: bool = False,
) -> torch.Tensor:
    """Cross entropy in float32, with logits computed only where there is a target, and for few positions at a time.

    The value is that of the full computation: the mean over the positions with a target or, with
    `num_items_in_batch`, their sum divided by it. The memory grows neither with the sequence nor with the answers:
    float32 logits of 1152 tokens over 65024 pieces are 300 MB a row. `chosen` positions nearly all have a target: they
    are all computed, because to count those that have one is to wait for the GPU.

    Shapes: states [B, S, H], targets [B, S] (what each position is to predict), output_layer [.., H] -> [.., V].
    """
    targets = targets.to(states.device)
    labelled = targets != ignore_index  # [B, S]
    if chosen:
        states, targets = states.flatten(0, -2), targets.flatten()  # [N, H], [N]
    else:
        states, targets = states[labelled], targets[labelled]  # [N, H], [N]
    weights = [weight for weight in output_layer.parameters() if weight.requires_grad]
    if not torch.is_grad_enabled():
        chunks = zip(states.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
        total = sum(summed_cross_entropy(*chunk, ignore_index, output_layer) for chunk in chunks)
    elif weights and is_deepspeed_zero3_enabled():  # which has a whole weight only while its layer is at work
        total = summed_cross_entropy(states, targets, ignore_index, output_layer)
    else:
        total = SummedCrossEntropy.apply(states, targets, ignore_index, output_layer, *weights)
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / (labelled.sum() if num_items_in_batch is None else num_items_in_batch)


def kept_states(states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The states [B, S, H] for which the library's `logits_to_keep` asks logits.

    It is the number of last positions (0: all), indices [N] or [B, N], or flags [B, S], which give [N, H].
    """
    if isinstance(logits_to_keep, int):
        return states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.dim() == 1:
        return states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return states[logits_to_keep]
    return states.take_along_dim(logits_to_keep[..., None], dim=1)


class CausalLMMixin:
    """The forward of a model that has a `transformer` and an `lm_head`."""

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] and, with `labels` [B, S], the loss; in training a loss comes without logits.

        `skip_logits` decides instead of the mode: False gives the logits in training too, True leaves them out in
        evaluation. The loss is that of `causal_lm_loss`; labels are -100 where nothing is learnt, and belong to all
        positions or, if there are as many, to those of `logits_to_keep`. `shift_labels` are instead what the
        positions of `logits_to_keep` are to predict, [B, S] where it keeps all. All else is as in the forward of
        `transformer`.
        """
        # Not a parameter: Trainer takes every parameter with "label" in its name for a label that each batch has.
        shift_labels = kwargs.pop("shift_labels", None)
        tokens = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
        past = {CACHE: past_key_values, "use_cache": use_cache}
        outputs = self.transformer(**tokens, **past, attention_mask=attention_mask, **kwargs)
        states = outputs.last_hidden_state  # [B, S, H]
        kept = kept_states(states, logits_to_keep)
        skip_logits = self.training if skip_logits is None else skip_logits
        loss = logits = None
        if labels is None or not skip_logits:
            logits = self.lm_head(kept)
        if labels is not None and shift_labels is not None:
            loss = causal_lm_loss(kept, shift_labels.view(kept.shape[:-1]), self.lm_head, num_items_in_batch)
        elif labels is not None:
            states = kept if labels.shape == kept.shape[:-1] else states
            chosen = states is kept and torch.is_tensor(logits_to_keep) and len(labels) == 1
            loss = causal_lm_loss(states[:, :-1], labels[:, 1:], self.lm_head, num_items_in_batch, chosen=chosen)
        return CausalLMOutputWithPast(
            logits=logits,
            loss=loss,
            attentions=outputs.attentions,
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )


class PrefixEmbedding(nn.Embedding):
    """Starts as torch makes it, with a deviation of 1, as published; the library's 0.02 is for text."""


class PrefixLinear(nn.Linear):
    """Likewise."""


class PrefixEncoder(nn.Module):
    """P-Tuning v2: learnt keys and values, which every layer sees before those of the text.

    `heads` are (g, d). With `prefix_projection` a network makes the states from embeddings of `projected_size`, or of
    their own size where it is None.
    """

    def __init__(self, config: PreTrainedConfig, heads: tuple[int, int], projected_size: int | None = None):
        super().__init__()
        self.shape = (2 * config.num_layers, *heads)
        row, inner = math.prod(self.shape), config.hidden_size
        learnt = projected_size or row if config.prefix_projection else row
        self.embedding = PrefixEmbedding(config.pre_seq_len, learnt)
        self.trans = nn.Identity()
        if config.prefix_projection:
            self.trans = nn.Sequential(PrefixLinear(learnt, inner), nn.Tanh(), PrefixLinear(inner, row))
        self.dropout = nn.Dropout(PREFIX_DROPOUT)

    def forward(self, batch_size: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Key and value [B, g, P, d] of each layer."""
        rows = self.trans(self.embedding.weight).to(dtype)  # [P, 2 L g d]
        rows = self.dropout(rows.expand(batch_size, -1, -1))
        states = rows.unflatten(-1, self.shape).permute(2, 0, 3, 1, 4)  # [2 L, B, g, P, d]
        return list(zip(states[0::2], states[1::2], strict=True))


class PrefixTunedMixin:
    """For models with a `prefix_encoder` where the configuration has `pre_seq_len`."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_untrained()  # loading makes new parameters
        return loaded

    def freeze_untrained(self):
        """With `pre_seq_len`, nothing of the language model but the prefix encoder is trained."""
        if self.config.pre_seq_len:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(any(part in name for part in TRAINED_WITH_PREFIX))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, (PrefixEmbedding, PrefixLinear)):
            module.reset_parameters()
        else:
            super()._init_weights(module)
