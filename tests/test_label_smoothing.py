"""--label_smoothing_factor: the labels of the next token, in every kind of batch, by hand."""

import json
import math

import pytest
import torch
from tiny import CHAT_FLAGS, losses, results
from transformers import AutoModelForCausalLM

import chatglm  # noqa: F401
from finetuning.batches import FlattenedCollator, PaddedCollator
from finetuning.label_smoothing import SmoothedCrossEntropy
from finetuning.row_attention import ROWWISE


GENERATIONS = ["chatglm1", "chatglm2", "chatglm3", "glm4_checkpoint", "llama"]
BATCHES = {"end to end": [], "padded": ["--no_padding_free"], "packed": ["--pack_to_length", 128]}


@pytest.fixture
def flags(chats):
    data = ["--train_file", chats, CHAT_FLAGS, "--max_target_length", 20, "--max_source_length", 90, "--do_train"]
    return [*data, "--max_steps", 1, "--lora_dropout", 0, "--per_device_train_batch_size", 4]


@pytest.mark.parametrize(
    "name, way",
    [
        *((name, "end to end") for name in GENERATIONS),
        ("chatglm1", "padded"),
        ("chatglm1", "packed"),
        ("llama", "padded"),
        ("llama", "packed"),
    ],
)
def test_first_loss_does_not_move_with_a_factor_near_zero(run, flags, name, way, request):
    model = ["--model_name_or_path", request.getfixturevalue(name)]
    plain = run(model, flags, BATCHES[way], output="plain")
    smooth = run(model, flags, BATCHES[way], "--label_smoothing_factor", 1e-6, output="smooth")
    assert losses(smooth) == pytest.approx(losses(plain), rel=1e-5)
    counts = [json.loads((f / "trainer_state.json").read_text())["log_history"] for f in (plain, smooth)]
    tokens = [log[0]["trained_tokens_per_second"] * log[-1]["train_runtime"] for log in counts]
    assert min(tokens) > 0


def smoothed_by_hand(model, row, factor):
    """Sum over the labels of one row, position by position in Python's floats."""
    logits, total = model(torch.tensor([row["input_ids"]])).logits[0].double(), 0.0
    for position, label in enumerate(row["labels"][1:]):
        if label != -100:
            scores = logits[position].tolist()
            logs = [score - math.log(sum(map(math.exp, scores))) for score in scores]
            total -= (1 - factor) * logs[label] + factor * sum(logs) / len(logs)
    return total


@pytest.mark.parametrize("collator", [PaddedCollator(0), PaddedCollator(0, answers_only=True), FlattenedCollator()])
@torch.no_grad()
def test_smoothed_loss_is_the_one_computed_by_hand(chatglm3, collator):
    model = AutoModelForCausalLM.from_pretrained(chatglm3)
    model.set_attn_implementation(ROWWISE)
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
        {"input_ids": [11, 12, 13], "labels": [-100, -100, 13]},
    ]
    batch = collator(rows)
    labels = batch.pop("labels")
    expected = sum(smoothed_by_hand(model, row, 0.2) for row in rows)
    loss = SmoothedCrossEntropy(0.2)
    assert loss(model(**batch), labels).item() == pytest.approx(expected / 4, rel=1e-5)
    assert loss(model(**batch), labels, torch.tensor(10)).item() == pytest.approx(expected / 10, rel=1e-5)


def test_smoothed_training_counts_the_same_tokens_and_evaluates_without_them(run, chatglm3, chats):
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 2]
    folder = run(flags, "--label_smoothing_factor", 0.3, "--do_eval", "--validation_file", chats)
    plain = run(flags, "--do_eval", "--validation_file", chats, output="plain")
    assert losses(folder)[0] != pytest.approx(losses(plain)[0], rel=1e-3)
    assert results(folder, "train")["train_trained_tokens_per_second"] > 0
    assert results(folder, "eval")["perplexity"] == pytest.approx(math.exp(results(folder, "eval")["eval_token_loss"]))


def test_smoothed_loss_that_is_not_finite_stops_the_run_and_shows_the_rows(run, chatglm3, chats, monkeypatch):
    forward = SmoothedCrossEntropy.forward
    monkeypatch.setattr(SmoothedCrossEntropy, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * math.nan)
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 2]
    with pytest.raises(
        FloatingPointError, match=r"The loss of step 1 is not a finite number(.|\n)*row 1 of the batch"
    ):
        run(flags, "--label_smoothing_factor", 0.1)
