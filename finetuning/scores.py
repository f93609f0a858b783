"""What an evaluation is scored with: accuracy and loss over the tokens that have a label.

Shapes: B rows, S positions, N positions whose logits are computed, V vocabulary rows, T virtual tokens of a prompt.
"""

import math

import datasets
import evaluate
import numpy as np
import torch
from torch.nn.functional import log_softmax
from transformers import TrainerCallback
from transformers.utils import is_torch_xla_available

from .batches import IGNORE_INDEX


def scoring(collator, row_format, training_args):
    """What Trainer scores an evaluation with, and makes of the logits for that; nothing if none is asked for."""
    if not training_args.do_eval or is_torch_xla_available():
        return {}
    if not row_format:
        if training_args.batch_eval_metrics or not training_args.eval_do_concat_batches:
            raise ValueError(
                "Blocks of text are scored all together: drop --batch_eval_metrics, or --eval_do_concat_batches False."
            )
        return {"compute_metrics": masked_accuracy, "preprocess_logits_for_metrics": best_tokens}
    training_args.batch_eval_metrics = True  # summed batch by batch: memory does not grow with the rows
    return {
        "compute_metrics": TokenScores(),
        "preprocess_logits_for_metrics": lambda logits, labels: row_scores(logits, labels, collator.end_to_end),
    }


def metric_defaults(given) -> dict:
    """Of --metric_for_best_model perplexity the lowest is best; Trainer knows that of losses only."""
    return {"greater_is_better": False} if "perplexity" in str(given.get("metric_for_best_model")) else {}


class PerplexityWhileTraining(TrainerCallback):
    """Adds the perplexity to each evaluation, whose metrics Trainer reads --metric_for_best_model from."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if str(args.metric_for_best_model).removeprefix("eval_") == "perplexity":
            metrics["eval_perplexity"] = state.log_history[-1]["eval_perplexity"] = perplexity(metrics)


def perplexity(metrics) -> float:
    """exp of the loss over all trained tokens or, on blocks of text, of the mean loss of the batches."""
    try:
        return math.exp(metrics.get("eval_token_loss", metrics["eval_loss"]))
    except OverflowError:
        return math.inf


# ----------------------------------------------------------------------------------------------------- blocks of text


class TokenAccuracy(evaluate.Metric):
    """Share of equal ids: evaluate's "accuracy", which it would fetch from the hub."""

    def _info(self):
        ids = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="Token accuracy", citation="", features=ids)

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}


def best_tokens(logits, labels):
    """Token ids [B, S] instead of logits [B, S, V], or [B, T + S, V] after T virtual tokens of a trained prompt."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(dim=-1)[:, -labels.shape[1] :]


def masked_accuracy(evaluation):
    """Accuracy over the positions that have a label; the prediction for a position is made one step before it."""
    predictions, labels = evaluation.predictions[:, :-1], evaluation.label_ids[:, 1:]
    kept = labels != IGNORE_INDEX
    return TokenAccuracy(keep_in_memory=True).compute(predictions=predictions[kept], references=labels[kept])


# ------------------------------------------------------------------------------------------------------ conversations


def row_scores(logits, labels, flattened):
    """[B, 3]: right tokens, trained tokens and their summed loss in each row. Labels are one position ahead of logits.

    It stands between the model and Trainer, so that no logits [B, N, V] are kept.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    logits = logits[:, -labels.shape[1] :]  # without the virtual tokens of a trained prompt
    targets = labels[:, 1:]
    trained = targets != IGNORE_INDEX
    count, rows = len(labels), torch.arange(len(labels), device=labels.device)[:, None].expand_as(targets)
    if flattened:  # a row begins at a -100 before a label; others fill up to the length of other processes
        begins = (labels[:, :-1] == IGNORE_INDEX) & trained
        count, rows = int(begins.sum()), begins.cumsum(dim=1) - 1
    scored, targets, rows = logits[:, :-1][trained], targets[trained], rows[trained]  # [N, V], [N], [N]
    losses = -log_softmax(scored.float(), dim=-1).gather(1, targets[:, None])[:, 0]
    columns = torch.stack([(scored.argmax(dim=-1) == targets).float(), torch.ones_like(losses), losses], dim=1)
    return columns.new_zeros(count, 3).index_add_(0, rows, columns)


class TokenScores:
    """Accuracy and loss over all trained tokens of an evaluation, however they lie in batches and processes.

    Called by Trainer for each batch (--batch_eval_metrics), so that memory does not grow with the rows.
    """

    def __init__(self):
        self.sums = torch.zeros(3, dtype=torch.float64)

    def __call__(self, evaluation, compute_result):
        self.sums += torch.as_tensor(evaluation.predictions).double().sum(dim=0).cpu()
        if not compute_result:
            return {}
        right, trained, loss = self.sums.tolist()
        self.__init__()
        return {"accuracy": right / trained, "token_loss": loss / trained}
