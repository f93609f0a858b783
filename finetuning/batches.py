"""Batches of encoded conversations: padded, or laid end to end.

Shapes: B rows, S positions (of a padded row, or of all rows end to end), N positions whose logits are computed.
"""

import inspect
import logging
import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from datasets import IterableDataset
from peft import PeftModel
from pyarrow.compute import list_value_length
from transformers import DataCollatorWithFlattening


logger = logging.getLogger("run_chatglm_lora.batches")

IGNORE_INDEX = -100  # the label that torch's cross entropy leaves out


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


class FlattenedCollator(DataCollatorWithFlattening):
    """Rows laid end to end, [1, S], without padding; each attends to itself only, and its positions begin at 0.

    Logits are made where the next token has a label, and at the end of each row: `logits_to_keep` [N]. The labels
    [1, N] of a row begin with -100, so that they are one position ahead of the logits, as everywhere. The library's
    collator, which knows neither packs nor these, makes the rest, with the bounds of the rows for the attention;
    `row_ends` are these again as a list, which is read without a wait for the GPU.
    """

    def __init__(self):
        super().__init__(return_flash_attn_kwargs=True)

    def __call__(self, rows):
        batch = super().__call__([single for row in rows for single in single_rows(row)])
        bounds, labels = batch["cu_seq_lens_q"].long(), batch["labels"][0]
        trained = labels != IGNORE_INDEX  # [S]; no row's first token is
        last, first = torch.zeros_like(trained), torch.zeros_like(trained)
        last[bounds[1:] - 1] = first[bounds[:-1]] = True
        return {
            **batch,
            "labels": labels[trained | first][None],
            "logits_to_keep": (trained.roll(-1) | last).nonzero()[:, 0],
            "row_ends": bounds.tolist(),
        }


def single_rows(row) -> list[dict]:
    """The rows in a pack, whose positions begin at 0 in each; a row that is none is the only one."""
    ends = [i for i, position in enumerate(row.get("position_ids") or [0]) if position == 0] + [len(row["input_ids"])]
    return [{name: list(row[name][a:b]) for name in ("input_ids", "labels")} for a, b in pairwise(ends)]


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


def example_lengths(data) -> np.ndarray:
    """Tokens of each example of a data set [N]; its columns are not known where it has none."""
    columns = data.with_format("arrow")[:]
    return list_value_length(columns["input_ids"]).to_numpy() if len(data) else np.empty(0)


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
