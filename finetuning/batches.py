"""Batches of encoded conversations: padded, or laid end to end.

Shapes: B rows, S positions (of a padded row, or of all rows end to end), N positions whose logits are computed.
"""

import inspect
import logging
import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise

import torch
from datasets import IterableDataset
from peft import PeftModel
from transformers import AttentionInterface, AttentionMaskInterface


logger = logging.getLogger("run_chatglm_lora.batches")

IGNORE_INDEX = -100  # the label that torch's cross entropy leaves out
ROWWISE = "sdpa_rowwise"
SDPA, SDPA_MASK = AttentionInterface()["sdpa"], AttentionMaskInterface()["sdpa"]


@dataclass
class PaddedCollator:
    """Rows padded on the right to the longest one, rounded up to `multiple_of`, or to `length`.

    With `answers_only` the model is told, as `logits_to_keep` [N], to make logits where some row has a label for the
    next token, and labels are [B, N]; else labels are [B, S]. In both the label of a position is what the model should
    say one position before it. It pads by itself: `tokenizer.pad` is where tokenizers that come with checkpoints
    break on newer libraries.
    """

    pad_token_id: int
    label_pad_id: int = IGNORE_INDEX
    length: int | None = None
    answers_only: bool = False
    multiple_of: int = 8

    def __call__(self, rows):
        longest = max(len(row["input_ids"]) for row in rows)
        width = self.length or math.ceil(longest / self.multiple_of) * self.multiple_of
        fills = {"input_ids": self.pad_token_id, "labels": self.label_pad_id, "attention_mask": 0}
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        batch = {
            name: torch.tensor([list(row[name]) + [fill] * (width - len(row[name])) for row in rows])  # [B, S]
            for name, fill in fills.items()
        }
        if self.answers_only:
            labels = batch["labels"]
            kept = (labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]  # [N - 1]
            batch["labels"] = torch.cat([torch.full_like(labels[:, :1], IGNORE_INDEX), labels[:, kept + 1]], dim=1)
            batch["logits_to_keep"] = torch.cat([kept, kept.new_tensor([width - 1])])
        return batch


class FlattenedCollator:
    """Rows laid end to end, [1, S], without padding; each attends to itself only, and its positions begin at 0.

    Logits are made where the next token has a label, and at the end of each row: `logits_to_keep` [N]. The labels
    [1, N] of a row begin with -100, so that they are one position ahead of the logits, as everywhere.
    """

    def __call__(self, rows):
        ids, positions, labels, kept, ends = [], [], [], [], [0]
        for row in rows:
            starts = [0, len(row["input_ids"])]
            if "position_ids" in row:  # several rows in a pack
                starts = [i for i, position in enumerate(row["position_ids"]) if position == 0] + starts[1:]
            for start, end in pairwise(starts):
                trained = [i for i in range(start + 1, end) if row["labels"][i] != IGNORE_INDEX]
                labels += [IGNORE_INDEX] + [row["labels"][i] for i in trained]
                kept += [ends[-1] + i - start - 1 for i in trained] + [ends[-1] + end - start - 1]
                positions += range(end - start)
                ends.append(ends[-1] + end - start)
            ids += row["input_ids"]
        bounds, longest = torch.tensor(ends, dtype=torch.int32), max(b - a for a, b in pairwise(ends))
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([labels]),
            "logits_to_keep": torch.tensor(kept),
            # what flash attention knows the rows by, and what ours does: a list, which needs no wait for the GPU
            **{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest},
            "row_ends": ends,
        }


def packed(batch, length):
    """Map function: rows gathered into packs of at most `length` tokens; `position_ids` begin at 0 in each row.

    Longest rows first, each into the fullest pack that still has room for it. Raises a ValueError for a longer row.
    """
    sizes = [len(ids) for ids in batch["input_ids"]]
    if max(sizes) > length:
        raise ValueError(f"--pack_to_length {length} does not hold a row of {max(sizes)} tokens: raise it.")
    packs, room = [], []  # room: sorted [(free tokens, number of the pack)]
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        place = bisect_left(room, (sizes[row],))
        free, pack = room.pop(place) if place < len(room) else (length, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(row)
        insort(room, (free - sizes[row], pack))
    return {
        "input_ids": [[token for row in pack for token in batch["input_ids"][row]] for pack in packs],
        "labels": [[label for row in pack for label in batch["labels"][row]] for pack in packs],
        "position_ids": [[position for row in pack for position in range(sizes[row])] for pack in packs],
    }


def repeated_stream(data):
    """A stream that begins again at its end; other data as they are.

    Trainer, too, reads a stream again until --max_steps, but a run that resumes after the first pass would begin at
    its first row, because Trainer takes the whole run for one pass.
    """
    return data.repeat(None) if isinstance(data, IterableDataset) else data


# --------------------------------------------------------------------------------------------- what a model can take


def base_of(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


def learns_prompt(model) -> bool:
    """Whether a trained prefix or prompt stands before each row: ChatGLM's own, or one of PEFT's."""
    config = getattr(model, "active_peft_config", None)
    return bool(getattr(base_of(model).config, "pre_seq_len", None) or getattr(config, "is_prompt_learning", False))


def takes_logits_to_keep(model) -> bool:
    """Whether a model has logits at chosen positions; virtual tokens of PEFT would move the positions."""
    config = getattr(model, "active_peft_config", None)
    moved = getattr(config, "is_prompt_learning", False)
    return not moved and "logits_to_keep" in inspect.signature(base_of(model).forward).parameters


@dataclass
class ChatCollator:
    """Padded batches, or rows end to end: what self_checks finds the model to take before the first batch is made.

    `longest` is the most tokens that a row may have.
    """

    padded: PaddedCollator
    longest: int
    end_to_end: bool = False

    def __call__(self, rows):
        return FlattenedCollator()(rows) if self.end_to_end else self.padded(rows)


def chat_collator(padding_id, chat_args, training_args, longest):
    """The collator for what the flags ask for: padded batches with all logits, unless more is asked for by hand."""
    # Batches of a stream go to each process whole: logits_to_keep and the rows' ends must not be cut into shares.
    training_args.accelerator_config.dispatch_batches = False
    if training_args.neftune_noise_alpha is not None:
        if chat_args.pack_to_length or chat_args.padding_free:
            raise ValueError(
                "--neftune_noise_alpha scales its noise by the length of a row, and --pack_to_length and "
                "--padding_free make one row of several: drop one of the flags."
            )
        logger.info("--neftune_noise_alpha: rows are padded, because NEFTune scales its noise by a row's length.")
        chat_args.no_padding_free = True
    padded = PaddedCollator(
        pad_token_id=padding_id,
        label_pad_id=IGNORE_INDEX if chat_args.ignore_pad_token_for_loss else padding_id,
        length=longest if chat_args.pad_to_max_length else None,
    )
    asked = chat_args.padding_free or chat_args.pack_to_length
    return ChatCollator(padded, longest, end_to_end=bool(asked and not chat_args.pad_to_max_length))


def rowwise_attention(module, query, key, value, attention_mask, row_ends=None, **kwargs):
    """sdpa row by row over a flattened batch, query [1, heads, S, d]; sdpa over any other.

    One mask over all rows would make each attend to all others, only to throw that away: 8 times the work in a batch
    of 8 rows.
    """
    if row_ends is None:
        return SDPA(module, query, key, value, attention_mask, **kwargs)
    rows = [
        SDPA(module, *(states[:, :, start:end] for states in (query, key, value)), None, **kwargs)[0]
        for start, end in pairwise(row_ends)
    ]
    return torch.cat(rows, dim=1), None  # [1, S, heads, d]


def rowwise_mask(*args, attention_mask=None, **kwargs):
    """No mask where there is no padding: each row is causal in itself."""
    return None if attention_mask is None else SDPA_MASK(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(ROWWISE, rowwise_attention)
AttentionMaskInterface.register(ROWWISE, rowwise_mask)
