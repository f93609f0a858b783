"""Batches without padding, packs, logits at answers only, and scores: the same numbers as the padded, full way."""

import json

import pytest
import torch
from tiny import CHAT_FLAGS, losses, results
from transformers import AutoModelForCausalLM, TrainingArguments

import chatglm  # noqa: F401
from finetuning.batches import FlattenedCollator, PaddedCollator, chat_collator, packed
from finetuning.row_attention import ROWWISE
from finetuning.self_checks import SelfChecks
from run_chatglm_lora import ChatArguments


ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]},
    {"input_ids": [11, 12, 13], "labels": [-100, -100, 13]},
    {"input_ids": [21, 22, 23, 24, 25, 26, 27], "labels": [-100, -100, 23, -100, -100, 26, 27]},
]


def test_padded_batch_has_its_longest_row_s_length_rounded_up():
    batch = PaddedCollator(pad_token_id=3)(ROWS)
    assert batch["input_ids"].tolist()[1] == [11, 12, 13] + [3] * 5
    assert batch["labels"].tolist()[1] == [-100, -100, 13] + [-100] * 5
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 3, 7]


def test_flattened_batch_lays_rows_end_to_end_and_keeps_the_logits_before_labels():
    batch = FlattenedCollator()(ROWS[:2])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 11, 12, 13]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["logits_to_keep"].tolist() == [2, 3, 4, 6, 7]
    assert batch["labels"].tolist() == [[-100, 8, 9, -100, 13]]
    assert batch["cu_seq_lens_q"].tolist() == batch["row_ends"] == [0, 5, 8]


def test_packs_hold_every_row_once_within_the_limit():
    pack = packed({name: [row[name] for row in ROWS] for name in ROWS[0]}, 8)
    assert sorted(map(len, pack["input_ids"])) == [7, 8]
    whole = FlattenedCollator()([dict(zip(pack, values, strict=True)) for values in zip(*pack.values(), strict=True)])
    assert sorted(whole["input_ids"].tolist()[0]) == sorted(token for row in ROWS for token in row["input_ids"])
    assert whole["row_ends"] == [0, 7, 12, 15] and whole["position_ids"].tolist()[0][7:] == [0, 1, 2, 3, 4, 0, 1, 2]
    with pytest.raises(ValueError, match="--pack_to_length 6 does not hold a row of 7 tokens: raise it"):
        packed({name: [row[name] for row in ROWS] for name in ROWS[0]}, 6)


def with_marks(rows, config) -> list[dict]:
    """The rows with the [gMASK] and <sop> that every row of ChatGLM-6B needs."""
    marks = [config.gmask_token_id, config.bos_token_id]
    return [
        {"input_ids": row["input_ids"][:2] + marks + row["input_ids"][2:],
         "labels": row["labels"][:2] + [-100] * 2 + row["labels"][2:]} for row in rows
    ]  # fmt: skip


def loss_and_gradient(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), next(
        p.grad for name, p in model.named_parameters() if "query_key_value" in name or "q_proj" in name
    )


def collated(model, rows, **flags):
    arguments = TrainingArguments("unused", use_cpu=True, do_train=True)
    chat_args = ChatArguments(**flags)
    collator = chat_collator(0, chat_args, arguments, 1160)
    SelfChecks(collator, {"train": rows}, chat_args, 0, is_pretrained=False).check(model, arguments)
    return collator(rows)


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "chatglm3", "glm4_checkpoint", "llama"])
def test_every_way_to_batch_gives_the_loss_and_gradient_of_the_full_computation(name, request):
    """Padded or end to end, with logits at answers only."""
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(name))
    rows = with_marks(ROWS, model.config) if name == "chatglm1" else ROWS
    loss, gradient = loss_and_gradient(model, PaddedCollator(pad_token_id=0)(rows))
    padded, flattened = collated(model, rows, no_padding_free=True), collated(model, rows)
    assert "row_ends" in flattened and model.config._attn_implementation == ROWWISE
    assert "logits_to_keep" in padded and padded["labels"].shape[1] < len(rows[-1]["input_ids"])
    for batch in (padded, flattened):
        same_loss, same_gradient = loss_and_gradient(model, batch)
        torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(same_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_training_without_padding_logs_the_losses_of_padded_training(run, chatglm3, chats):
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 4]
    flags += ["--lora_dropout", 0, "--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2]
    without, padded = run(flags, output="without"), run(flags, "--no_padding_free", output="padded")
    assert losses(without) == pytest.approx(losses(padded), rel=1e-5)
    log = json.loads((without / "trainer_state.json").read_text())["log_history"]
    assert log[0]["padding_share"] == 0 and log[0]["trained_tokens_per_second"] > 0
    totals = results(padded, "train")
    assert totals["train_padding_share"] > 0 and totals["train_peak_memory_gib"] > 0


@pytest.mark.parametrize("name", ["chatglm1", "chatglm3"])
def test_packed_training_sees_every_row_once_an_epoch(run, name, request, chats):
    flags = ["--model_name_or_path", request.getfixturevalue(name), "--train_file", chats, CHAT_FLAGS, "--do_train"]
    flags += ["--lora_dropout", 0, "--num_train_epochs", 1, "--learning_rate", 0]
    packs = run(flags, "--pack_to_length", 8000, "--per_device_train_batch_size", 1, output="packs")
    rows = run(flags, "--per_device_train_batch_size", 64, output="rows")
    assert losses(packs) == pytest.approx(losses(rows), rel=1e-5) and len(losses(packs)) == 1


def test_noisy_embeddings_are_scaled_by_the_length_of_padded_rows(run, chatglm3, chats, caplog):
    """Rows end to end would get the noise of one row as long as all of them."""
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 2]
    flags += ["--neftune_noise_alpha", 5, "--log_level", "info"]
    with caplog.at_level("INFO"):
        folder = run(flags)
    assert "--neftune_noise_alpha: rows are padded" in caplog.text
    assert losses(folder) == losses(run(flags, "--no_padding_free", output="padded"))
    with pytest.raises(ValueError, match="--padding_free make one row of several: drop one of the flags"):
        run(flags, "--pack_to_length", 128, output="packed")
