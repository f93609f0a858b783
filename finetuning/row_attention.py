"""How rows that lie end to end attend: one kernel call a layer on a GPU, torch's sdpa row by row anywhere else.

Two attention functions of the library's AttentionInterface, for any model whose own one is sdpa. A batch brings the
bounds of its rows as for flash attention, `cu_seq_lens_q` and `max_length_q`, and as a list, `row_ends`: reading the
bounds from the GPU would make every layer wait for it. A batch without bounds, or a padded one, is left to sdpa.

Shapes: S positions of all rows, n query heads, g key/value heads, d head size.
"""

import inspect
from itertools import pairwise

import torch
from transformers import AttentionInterface, AttentionMaskInterface


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch below 2.10
    varlen_attn = None

ROWWISE, VARLEN = "sdpa_rowwise", "torch_varlen"
SDPA, SDPA_MASK = AttentionInterface()["sdpa"], AttentionMaskInterface()["sdpa"]
VARLEN_KEYWORDS = {"scale", "window_size", "enable_gqa"}
HALF = (torch.float16, torch.bfloat16)
FIRST_CAPABILITY = (8, 0)  # Ampere: what torch's flash attention runs on
MOST_CHANNELS = 256  # of a head, in that kernel; it takes multiples of 8
SCORE_CHANGES = ("softcap", "s_aux", "position_bias")  # of attention scores, which that kernel lacks


def row_attentions(own, device, dtype, capability, kernel=varlen_attn) -> list[str]:
    """Names of the attentions to try for rows end to end, the fastest first, for a model whose own one is `own`.

    `device` is a type, `dtype` that of the matrix products, `capability` (major, minor) of a GPU or None.
    """
    if own != "sdpa":
        return [own]
    known = kernel is not None and inspect.signature(kernel).parameters.keys() >= VARLEN_KEYWORDS
    runs = known and device == "cuda" and dtype in HALF and capability >= FIRST_CAPABILITY
    return [VARLEN, ROWWISE, own] if runs else [ROWWISE, own]


def varlen_takes(dtype, channels, value_channels, dropout) -> bool:
    return dtype in HALF and channels == value_channels <= MOST_CHANNELS and channels % 8 == 0 and not dropout


def varlen_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, sliding_window=None,
    cu_seq_lens_q=None, cu_seq_lens_k=None, max_length_q=None, max_length_k=None, **kwargs,
):  # fmt: skip
    """All rows in one call, query [1, n, S, d], key and value [1, g, S, d] without repeated heads -> [1, S, n, d].

    What the kernel does not take goes row by row: float32 outside of autocast, dropout, changed scores.
    """
    autocast = torch.is_autocast_enabled(query.device.type)
    dtype = torch.get_autocast_dtype(query.device.type) if autocast else query.dtype
    changed = any(kwargs.get(name) is not None for name in SCORE_CHANGES)
    rows = cu_seq_lens_q is not None and attention_mask is None
    if not rows or changed or not varlen_takes(dtype, query.shape[-1], value.shape[-1], dropout):
        bounds = {"cu_seq_lens_q": cu_seq_lens_q, "is_causal": is_causal, "sliding_window": sliding_window}
        options = {"dropout": dropout, "scaling": scaling, **bounds, **kwargs}
        return rowwise_attention(module, query, key, value, attention_mask, **options)

    left = -1 if sliding_window is None else sliding_window - 1
    causal = module.is_causal if is_causal is None else is_causal
    # Under autocast, rotated queries and keys are float32 where the embeddings are, and values are not.
    states = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # [S, heads, d] each
    context = varlen_attn(
        *states, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
        scale=scaling, window_size=(left, 0 if causal else left), enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    return context[None], None


def rowwise_attention(module, query, key, value, attention_mask, row_ends=None, cu_seq_lens_q=None, **kwargs):
    """sdpa row by row over a flattened batch, query [1, n, S, d] -> [1, S, n, d]; sdpa over any other.

    One mask over all rows would make each attend to all others, only to throw that away: 8 times the work in a batch
    of 8 rows. A mask [1, 1, S, S] that is more than causal is cut into those of the rows.
    """
    if cu_seq_lens_q is None:
        return SDPA(module, query, key, value, attention_mask, **kwargs)
    contexts = []
    for start, end in pairwise(row_ends or cu_seq_lens_q.tolist()):
        mask = attention_mask if attention_mask is None else attention_mask[..., start:end, start:end]
        row = (states[:, :, start:end] for states in (query, key, value))
        contexts.append(SDPA(module, *row, mask, **kwargs)[0])
    return torch.cat(contexts, dim=1), None


def rowwise_mask(*args, attention_mask=None, is_causal=True, **kwargs):
    """No mask where there is no padding: each row is causal in itself, unless the model says `is_causal` False."""
    if attention_mask is None and is_causal:
        return None
    return SDPA_MASK(*args, attention_mask=attention_mask, **kwargs)


def varlen_mask(*args, attention_mask=None, **kwargs):
    """No mask where there is no padding: what rows end to end see is said with their bounds."""
    return None if attention_mask is None else SDPA_MASK(*args, attention_mask=attention_mask, **kwargs)


for name, attention, mask in (
    (ROWWISE, rowwise_attention, rowwise_mask),
    (VARLEN, varlen_attention, varlen_mask),
):
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
