"""How a training may batch the rows of an architecture, and whether its answers with a cache are right."""

from dataclasses import dataclass

from transformers import TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetuning.batches import PaddedCollator, chat_collator
from finetuning.self_checks import SelfChecks, check_answers, evaluated
from run_chatglm_lora import ChatArguments

from .architectures import CHATGLM, random_rows, tiny_model


ALL_TYPES = [*CHATGLM, *sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
LONGEST = 100  # tokens of a row
TOLERANCE = 1e-5  # relative, of a loss in float32


@dataclass
class Verdict:
    name: str
    batches: str  # "end to end", "padded", "refused", "not built" or, were it ever so, "WRONG"
    answers: str  # whether those with a cache are right
    why: str


def settled_collator(model):
    """The collator that the self-checks of a training settle on."""
    args = TrainingArguments("unused", use_cpu=True, do_train=True, report_to="none")
    chat_args = ChatArguments()
    collator = chat_collator(0, chat_args, args, LONGEST)
    checks = SelfChecks(collator, {"train": random_rows([23, 31, 12], seed=0)}, chat_args, 0, is_pretrained=False)
    checks.check(model, args)
    return collator, checks.results


def wrong_loss(model, collator) -> float:
    """How far the loss of a batch is from that of its rows alone, weighted by their tokens."""
    rows = random_rows([17, 90, 9, 40], seed=1)
    counts = [len(row["input_ids"]) - 4 for row in rows]
    with evaluated(model):
        alone = [model(**PaddedCollator(0, multiple_of=1)([row])).loss.item() for row in rows]
        together = model(**collator(rows)).loss.item()
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    return abs(together - expected) / expected


def verdict(name) -> Verdict:
    try:
        model = tiny_model(name)
    except Exception as error:
        return Verdict(name, "not built", "", first_line(error))
    try:
        check_answers(model, [row["input_ids"][:-2] for row in random_rows([9, 14], seed=2)], 0)
        answers = "yes"
    except Exception as error:
        answers = f"no: {first_line(error)}"
    try:
        collator, results = settled_collator(model)
    except Exception as error:
        return Verdict(name, "refused", answers, first_line(error))
    if (wrong := wrong_loss(model, collator)) > TOLERANCE:
        return Verdict(name, "WRONG", answers, f"the loss is off by {wrong:.1e}")
    batches, _, why = results["batches"].partition(": ")
    return Verdict(name, batches, answers, why)


def first_line(error) -> str:
    return " ".join(str(error).split())[:160].replace("|", "/") or type(error).__name__
