"""What a run relies on in a model and its library, tried on the loaded model before the first step.

The model is tried as it will be trained, on the first real rows, in evaluation mode. Rows end to end and logits at
chosen positions are used only where they give what each row gives alone; whatever else is wrong is an error.

Shapes: T tokens that have a label, row after row; V vocabulary rows.
"""

import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice

import torch
import transformers
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from . import chunked_loss
from .batches import (
    IGNORE_INDEX,
    FlattenedCollator,
    PaddedCollator,
    base_of,
    learns_prompt,
    single_rows,
    takes_logits_to_keep,
)
from .prediction import left_padded
from .row_attention import row_attentions
from .versions import NEWEST, OLDEST


logger = logging.getLogger("run_chatglm_lora.self_checks")

VERSIONS = f"This is transformers {transformers.__version__}; tested are {OLDEST} to {NEWEST}."
ANSWER_TOKENS = 8
ROWS_LOOKED_AT = 16
CHUNKS = 256  # that state-space models compute in, whether their configuration says so or not
LONGEST_ROW = 8192
LONG_ROW_TOKENS = 64  # at its end, are compared

# How far the logits of a row may be off, as a vector, relative to their spread over the vocabulary. Measured over the
# causal models of transformers with 4 layers and seven of them with 24: another batch rounds otherwise, which moves
# them by at most 1.2 eps of the dtype (in float32 by 1e-6); another row's tokens by 4e-3 and more, mostly by 0.1 to 1.
ROUNDING = 4  # eps of the dtype, a factor of 3 above
SAME_SHAPES = 0.5  # eps, where shapes are the same and rounding is too, but for a mixture of experts
LEAST = 1e-4  # in float32, whose eps is 1e-7: 24 layers and reductions on a GPU may make 100 of it


class SelfCheckFailed(RuntimeError):
    """The model does not compute what the run relies on."""


class SelfChecks(TrainerCallback):
    """Tries a model before it is trained or, where it is not, before it is evaluated or answers.

    `collator` (a batches.ChatCollator; None: blocks of text) is told what the model was found to take. `data` are the
    encoded splits by name. `results` are for provenance.json. Raises SelfCheckFailed.
    """

    trainer = None  # known where the run is guarded; its model is the one that FSDP has wrapped

    def __init__(self, collator, data, chat_args, pad_token_id, is_pretrained):
        self.collator, self.data, self.chat_args = collator, data, chat_args
        self.pad_token_id, self.is_pretrained = pad_token_id, is_pretrained
        self.results = {}

    def on_init_end(self, args, state, control, model, **kwargs):
        if not args.do_train and (is_deepspeed_zero3_enabled() or args.fsdp):
            logger.info("No self-check: a model is put together from its shards in a training only. Rows are padded.")
        elif not args.do_train:
            self.check(model, args)

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.check(self.trainer.model if self.trainer else model, args)

    def check(self, model, args):
        began = time.perf_counter()
        autocast = [torch.bfloat16] * args.bf16 + [torch.float16] * args.fp16
        with evaluated(model):
            probe = Probe(model, self.pad_token_id, rounding_unit(model, autocast), next(iter(autocast), None))
            if args.do_train or args.do_eval:
                self.check_losses(probe, self.data["train" if args.do_train else "validation"], args)
            prompts = [self.data[split] for split in ("test", "questions", "samples") if split in self.data]
            if prompts:
                self.results["answers"] = probe.answers(prompts_of(prompts[0]))
        self.results["seconds"] = round(time.perf_counter() - began, 2)
        logger.info(f"Self-check: {self.results}")

    def check_losses(self, probe, data, args):
        rows = short_rows(data)
        alone, self.results["loss"], chance = probe.next_tokens(rows if self.collator else rows[:1])
        if self.is_pretrained and self.results["loss"] > 0.9 * chance:
            logger.warning(
                f"This checkpoint predicts no better than chance: its loss on the first rows is "
                f"{self.results['loss']:.2f}, that of a blind guess {chance:.2f}. Wrong weights, vocabulary or prompt?"
            )
        if args.do_train and (self.collator or isinstance(probe.model, PeftModel)):
            self.settle_loss(probe, rows[:1], args)
        if self.collator:
            single = max(args.per_device_train_batch_size, args.per_device_eval_batch_size) * max(args.n_gpu, 1) == 1
            self.check_batches(probe, rows, alone, single, args.n_gpu)

    def settle_loss(self, probe, rows, args):
        """Let the model compute the losses of the training in chunks, where that gives the same."""
        batch = PaddedCollator(self.pad_token_id, multiple_of=1)(rows)
        why, failure = tried(lambda: chunked_loss.why_whole(probe, batch, args))
        why = failure or why
        if why is None:
            chunked_loss.ChunkedLoss(probe.model).use()
        self.results["training_loss"] = f"the model's own: {why}" if why else "in chunks"

    def check_batches(self, probe, rows, alone, single, n_gpu):
        """Settle how the collator makes batches, as far as the flags leave that open."""
        flags, padded = self.chat_args, self.collator.padded
        self.results["padding"] = None if single else probe.padding(rows, alone)
        padded.multiple_of = 1 if single else padded.multiple_of
        chosen, why = probe.chosen_logits(rows, alone)
        padded.answers_only = chosen and not flags.pad_to_max_length
        self.results["logits"] = "at labels" if chosen else "all"
        if not chosen:
            logger.warning(f"{probe.name}: all logits are computed, not only those that have a label: {why}.")
        if flags.no_padding_free or flags.pad_to_max_length:
            return
        apart = False
        if chosen and n_gpu > 1:
            why = "a batch is cut into shares for several GPUs: start one process for each"
        elif chosen:
            apart, why = probe.end_to_end(rows, alone, self.collator.longest)
        self.results["batches"] = "end to end" if apart else f"padded: {why}"
        self.results["attention"] = probe.base.config._attn_implementation
        if not apart and (flags.padding_free or flags.pack_to_length):
            flag = "--pack_to_length" if flags.pack_to_length else "--padding_free"
            raise SelfCheckFailed(
                f"{flag}: {probe.name} cannot keep rows that lie end to end apart ({why}): drop the flag."
            )
        if not apart:
            logger.warning(f"{probe.name}: rows are padded, not laid end to end: {why}.")
        self.collator.end_to_end = apart


def of(trainer) -> SelfChecks | None:
    return next((each for each in trainer.callback_handler.callbacks if isinstance(each, SelfChecks)), None)


def know(trainer):
    """Let the check of a training see what Trainer makes of the model."""
    if checks := of(trainer):
        checks.trainer = trainer


def results_of(trainer) -> dict | None:
    """What was found out, for provenance.json; None with --no_self_check."""
    checks = of(trainer)
    return checks and checks.results


def check_answers(model, prompts, pad_token_id):
    """Raise SelfCheckFailed unless a model answers two prompts (lists of ids) with a cache as it does without."""
    with evaluated(model):
        Probe(model, pad_token_id, rounding_unit(model)).answers(prompts)


def check_cached(moved, bound, name):
    """Raise SelfCheckFailed if a cache moves the logits of answers by more than a bound, both relative."""
    if not moved <= bound:
        raise SelfCheckFailed(
            f"{name}: answers with a cache are not those without (their logits are off by {moved:.1%}, rounding is "
            f"{bound:.2%}), so that none is given. {VERSIONS}"
        )


@dataclass
class Probe:
    """A model in evaluation mode; `unit` is the relative rounding error of one of its numbers.

    `autocast` is the dtype that a mixed-precision training computes in.
    """

    model: torch.nn.Module
    pad_token_id: int
    unit: float
    autocast: torch.dtype | None = None

    @property
    def name(self) -> str:
        return self.base.config.model_type

    @property
    def base(self):
        return base_of(self.model)

    def bound(self, eps=ROUNDING) -> float:
        return rounding_bound(self.unit, eps)

    def forward(self, batch):
        device = next(self.model.parameters()).device
        return self.model(**{name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()})

    def logits(self, batch) -> torch.Tensor:
        """Logits [T, V] of the tokens of a batch that have a label, in float32.

        Raises SelfCheckFailed if the model's loss is not their cross entropy; a mixture of experts and AdaLoRA may
        add to it.
        """
        output = self.forward(batch)
        targets = batch["labels"][:, 1:].to(output.logits.device)
        trained = targets != IGNORE_INDEX
        logits = output.logits[:, -targets.shape[1] - 1 : -1][trained].float()  # without a prompt's virtual tokens
        loss, given = cross_entropy(logits, targets[trained]).item(), output.loss.item()
        rounding = max(LEAST, ROUNDING * torch.finfo(output.loss.dtype).eps)
        added = getattr(output, "aux_loss", None) is not None or getattr(self.model, "peft_type", None) == "ADALORA"
        if not added and not abs(given - loss) <= rounding * loss:
            raise SelfCheckFailed(
                f"{self.name}: the loss that the model gives, {given:.4f}, is not that of the next token, {loss:.4f}: "
                "it cannot be trained with this script."
            )
        return logits

    def padded(self, rows, **options) -> torch.Tensor:
        return self.logits(PaddedCollator(self.pad_token_id, **options)(rows))

    def next_tokens(self, rows) -> tuple[torch.Tensor, float, float]:
        """Logits of each row alone, their loss, and that of a blind guess. No later token may have changed them."""
        alone = torch.cat([self.padded([row], multiple_of=1) for row in rows])
        first = rows[0]["input_ids"]
        changed = {**rows[0], "input_ids": [*first[:-1], first[0]]}
        seen = difference(self.padded([changed], multiple_of=1), alone[: label_count(rows[0])], rows[:1])
        if not seen <= self.bound(SAME_SHAPES):
            raise SelfCheckFailed(
                f"{self.name}: the model sees the tokens that it should predict (another last token moves the logits "
                f"before it by {seen:.1%}): it cannot be trained as a causal language model."
            )
        return alone, round(loss_of(alone, rows), 4), math.log(alone.shape[1])

    def padding(self, rows, alone) -> float:
        """How far padding moves the logits; SelfCheckFailed if that is more than rounding."""
        moved = difference(self.padded(rows), alone, rows)
        if not moved <= self.bound():
            raise SelfCheckFailed(
                f"{self.name}: padding moves the logits of a row by {moved:.1%} (rounding: {self.bound():.1%}): it "
                "cannot be trained in batches, so pass --per_device_train_batch_size 1 --per_device_eval_batch_size 1."
            )
        return moved

    def chosen_logits(self, rows, alone) -> tuple[bool, str | None]:
        """Whether logits_to_keep gives the logits at chosen positions; if not, why."""
        if not takes_logits_to_keep(self.model):
            return False, "it has no logits_to_keep"
        logits, why = tried(lambda: torch.cat([self.padded([row], answers_only=True, multiple_of=1) for row in rows]))
        return self.alike(logits, alone, rows, "at chosen positions", why)

    def end_to_end(self, rows, alone, longest) -> tuple[bool, str | None]:
        """Whether rows that lie end to end are kept apart, and if not, why; leaves the fastest attention that does."""
        if learns_prompt(self.model):
            return False, "a trained prefix stands before each row"
        long = long_row(rows, min(max(longest_window(self.base.config), CHUNKS) + 16, longest, LONGEST_ROW))
        count = label_count(rows[0])
        long_alone = self.padded([long], answers_only=True, multiple_of=1)
        expected = torch.cat([alone[:count], long_alone, alone[count:]])
        rows = [rows[0], long, *rows[1:]]
        own, device = self.base.config._attn_implementation, next(self.model.parameters()).device
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        for attention in row_attentions(own, device.type, self.autocast or self.base.dtype, capability):
            if attention != self.base.config._attn_implementation:
                self.base.set_attn_implementation(attention)
            logits, why = tried(lambda: self.logits(FlattenedCollator()(rows)))
            apart, why = self.alike(logits, expected, rows, "end to end", why)
            apart, why = self.without_neighbours(logits, rows) if apart else (False, why)
            if apart:
                break
            logger.info(f"{self.name}: attention {attention} does not keep rows end to end apart: {why}.")
        return apart, why

    def without_neighbours(self, logits, rows) -> tuple[bool, str | None]:
        """Whether rows end to end are the same between others of the same lengths: sharper in half precision."""
        others = [{**row, "input_ids": row["input_ids"][::-1]} if i % 2 == 0 else row for i, row in enumerate(rows)]
        changed = self.logits(FlattenedCollator()(others))
        kept = torch.tensor([i % 2 for i, row in enumerate(rows) for _ in range(label_count(row))], dtype=torch.bool)
        moved = difference(changed[kept], logits[kept], rows[1::2])
        return moved <= self.bound(SAME_SHAPES), f"other rows beside it move the logits of a row by {moved:.1%}"

    def alike(self, logits, alone, rows, way, why) -> tuple[bool, str | None]:
        if logits is None:
            return False, why
        if difference(logits, alone, rows) <= self.bound():
            return True, None
        return False, f"the loss is {loss_of(logits, rows):.4f} {way}, {loss_of(alone, rows):.4f} for each row alone"

    def answers(self, prompts) -> float:
        """How far a cache moves the logits of greedy answers; SelfCheckFailed if that is more than rounding."""
        device = next(self.model.parameters()).device
        ids = left_padded(prompts, self.pad_token_id).to(device)  # [B, S]
        mask = left_padded([[1] * len(prompt) for prompt in prompts], 0).to(device)  # [B, S]
        try:
            output = self.model.generate(
                input_ids=ids, attention_mask=mask, pad_token_id=self.pad_token_id, use_cache=True, num_beams=1,
                do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=ANSWER_TOKENS,
                min_new_tokens=ANSWER_TOKENS, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        except Exception as error:
            raise SelfCheckFailed(f"{self.name}: this model cannot generate: {error}. {VERSIONS}") from error
        cached = torch.stack(output.logits, dim=1).float()  # [B, ANSWER_TOKENS, V]
        moved = 0.0
        for prompt, sequence, logits in zip(prompts, output.sequences.tolist(), cached, strict=True):
            row = {"input_ids": [*prompt, *sequence[ids.shape[1] :]]}
            row["labels"] = [IGNORE_INDEX] * len(prompt) + row["input_ids"][len(prompt) :]
            moved = max(moved, difference(logits, self.padded([row], multiple_of=1), [row]))
        check_cached(moved, self.bound(), self.name)
        return moved


# ------------------------------------------------------------------------------------------------------ small parts


@contextmanager
def evaluated(model):
    """The model in evaluation mode without gradients, and without a cache, as Trainer has it; the modes come back."""
    config, training = base_of(model).config, model.training
    cached, config.use_cache = getattr(config, "use_cache", None), False
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        config.use_cache = cached


def tried(forward):
    """What a forward pass gives, or None and why: a model may refuse what it was not made for."""
    try:
        return forward(), None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def rounding_unit(model, autocast=()) -> float:
    """eps of the coarsest dtype that a forward pass computes in.

    Quantised layers count as bfloat16, which has no more than their 8 bits; TF32 has the 10 bits of float16.
    """
    stored = {parameter.dtype for parameter in model.parameters()}
    dtypes = {dtype if dtype.is_floating_point else torch.bfloat16 for dtype in stored} | set(autocast)
    if torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32:
        dtypes.add(torch.float16)
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def rounding_bound(unit, eps=ROUNDING) -> float:
    return max(LEAST, eps * unit)


def relative_difference(logits, expected) -> float:
    """How far logits [T, V] are from what is expected, relative to their spread over the vocabulary."""
    spread = expected - expected.mean(dim=-1, keepdim=True)
    return ((logits - expected).norm() / spread.norm()).item()


def difference(logits, expected, rows) -> float:
    """The relative difference of the logits [T, V] of the worst row."""
    counts = [label_count(row) for row in rows]
    parts = zip(logits.split(counts), expected.split(counts), strict=True)
    return max(relative_difference(*part) for part in parts)


def loss_of(logits, rows) -> float:
    targets = [label for row in rows for label in row["labels"][1:] if label != IGNORE_INDEX]
    return cross_entropy(logits, torch.tensor(targets, device=logits.device)).item()


def label_count(row) -> int:
    return sum(label != IGNORE_INDEX for label in row["labels"][1:])


def short_rows(data) -> list[dict]:
    """The three shortest of the first rows that have a label; packs are taken apart."""
    rows = [single for row in islice(data, ROWS_LOOKED_AT) for single in single_rows(row)]
    rows = sorted((row for row in rows if label_count(row)), key=lambda row: len(row["input_ids"]))
    return (rows * 3)[:3]


def long_row(rows, length) -> dict:
    """A row made by repeating others; its last tokens have labels."""
    ids = list(islice(cycle(token for row in rows for token in row["input_ids"]), length))
    untrained = max(1, length - LONG_ROW_TOKENS)
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * untrained + ids[untrained:]}


def longest_window(config) -> int:
    """The widest attention window or chunk that a configuration names; 0 without any."""
    numbers = config.get_text_config().to_dict().items()
    return max((n for name, n in numbers if isinstance(n, int) and ("window" in name or "chunk" in name)), default=0)


def prompts_of(data) -> list[list[int]]:
    """The shortest and the longest of the first prompts. Raises ValueError where there is none."""
    prompts = sorted((list(row["input_ids"]) for row in islice(data, ROWS_LOOKED_AT)), key=len)
    if not prompts:
        raise ValueError("There is nothing to answer: all questions were left out as bad rows (--skip_bad_rows).")
    return [prompts[0], prompts[-1]]
