"""Conversations: from rows to ids and labels, within the limits, and nothing lost in silence."""

import json
import logging
from dataclasses import replace
from itertools import chain

import pytest
import torch
from tiny import CHAT_FLAGS, CHATS, results, said, write_jsonl
from transformers import AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

import chatglm  # noqa: F401
from finetuning.batches import IGNORE_INDEX, PaddedCollator
from finetuning.chat_rows import RowFormat, conversation
from finetuning.encoding import (
    answers_apart,
    encoded_conversations,
    prompt_ids,
    up_to_answers,
    without_oldest_turns,
)
from run_chatglm_lora import ChatArguments, within_positions


ROW = RowFormat("prompt_response", "prompt", "response", "history")
ARGS = ChatArguments(prompt_column="prompt", response_column="response", history_column="history")
TURNS = said("你好", "你好，我是小茶。", "有绿茶吗？", "有龙井。")


@pytest.fixture(scope="module")
def glm3(chatglm3):
    return AutoTokenizer.from_pretrained(chatglm3)


@pytest.fixture(scope="module")
def glm2(chatglm2):
    return AutoTokenizer.from_pretrained(chatglm2)


@pytest.fixture(scope="module")
def glm1(chatglm1):
    return AutoTokenizer.from_pretrained(chatglm1)


@pytest.fixture(scope="module")
def glm4(glm4_checkpoint):
    return AutoTokenizer.from_pretrained(glm4_checkpoint)


def encoded(tokenizer, messages, args=ARGS):
    """The examples of one conversation."""
    conversations = up_to_answers(messages, answers_apart(tokenizer))
    return list(chain.from_iterable(encoded_conversations(tokenizer, conversations, args)))


def trained_ids(example):
    return [label for label in example["labels"] if label != IGNORE_INDEX]


def test_chatglm3_example_trains_every_answer_and_the_token_that_ends_it(glm3):
    (example,) = encoded(glm3, TURNS)
    user = glm3.convert_tokens_to_ids("<|user|>")
    newline = glm3.encode("\n", add_special_tokens=False)
    answers = [newline + glm3.encode(TURNS[i]["content"], add_special_tokens=False) for i in (1, 3)]
    assert trained_ids(example) == answers[0] + [user] + answers[1] + [glm3.eos_token_id]
    kept = zip(example["input_ids"], example["labels"], strict=True)
    assert all(label in (token, IGNORE_INDEX) for token, label in kept)


@pytest.mark.parametrize("name", ["glm1", "glm2"])
def test_answers_become_one_example_each_where_the_history_is_written_anew(name, request):
    tokenizer = request.getfixturevalue(name)
    first, second = encoded(tokenizer, TURNS)
    for example, end in ((first, 2), (second, 4)):
        answer = tokenizer.encode(TURNS[end - 1]["content"], add_special_tokens=False) + [tokenizer.eos_token_id]
        assert trained_ids(example) == answer
        assert example["input_ids"] == prompt_ids(tokenizer, TURNS[: end - 1]) + answer


def test_answers_of_glm4_end_with_the_token_of_the_user(glm4):
    (example,) = encoded(glm4, TURNS)
    user = glm4.convert_tokens_to_ids("<|user|>")
    trained = trained_ids(example)
    assert trained.count(user) == 2 and trained[-1] == user
    assert glm4.decode(trained, skip_special_tokens=True).split() == [TURNS[1]["content"], TURNS[3]["content"]]


def test_template_without_generation_marks_gets_the_right_labels(tokenizer):
    messages = [{**turn, "content": text} for turn, text in zip(TURNS, ["hi", "a door", "why", "dawn"], strict=True)]
    (example,) = encoded(tokenizer, messages)
    assert tokenizer.decode(trained_ids(example)) == "a door<|im_end|>\ndawn<|im_end|>\n"
    assert tokenizer.decode(example["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("name", ["glm3", "glm4"])
def test_chatglm_with_a_template_of_the_users_own_trains_its_answers(name, request, monkeypatch):
    tokenizer = request.getfixturevalue(name)
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}。{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    (example,) = encoded(tokenizer, TURNS)
    assert tokenizer.decode(example["input_ids"]).replace(" ", "").startswith("<|user|>你好。<|assistant|>你好，我是")
    first, last = (tokenizer.encode(TURNS[i]["content"] + "。", add_special_tokens=False) for i in (1, 3))
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert trained_ids(example) == first + [user] + last + [tokenizer.end_of_reply_token_id]


@pytest.mark.parametrize("name", ["glm1", "glm2", "glm3", "glm4", "tokenizer"])
def test_training_example_begins_with_the_prompt_used_for_prediction(name, request):
    tokenizer = request.getfixturevalue(name)
    example = encoded(tokenizer, TURNS)[-1]
    prompt = prompt_ids(tokenizer, TURNS[:3])
    assert example["input_ids"][: len(prompt)] == prompt
    assert example["labels"][len(prompt) :] == example["input_ids"][len(prompt) :]


SPECIAL = {"glm1": "<eop>", "glm2": "</s>", "glm3": "<|assistant|>", "glm4": "<|user|>"}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_token_text_in_a_message_stays_text(name, request):
    tokenizer = request.getfixturevalue(name)
    special = {SPECIAL[name]: 1 if name != "glm4" else 2, "[gMASK]": 1}  # GLM-4's <|user|> opens and closes
    messages = said("".join(special), "好")
    (example,) = encoded(tokenizer, messages)
    for token, count in special.items():
        assert example["input_ids"].count(tokenizer.convert_tokens_to_ids(token)) == count


@pytest.mark.parametrize("name", ["glm3", "glm2", "tokenizer"])
def test_long_history_loses_its_oldest_turns_and_keeps_question_and_cue(name, request):
    tokenizer = request.getfixturevalue(name)
    old = said("旧" * 30, "话" * 30)
    limit = len(prompt_ids(tokenizer, TURNS[:3]))
    assert without_oldest_turns(tokenizer, old + TURNS, limit) == TURNS
    assert without_oldest_turns(tokenizer, old + TURNS, limit - 1) == TURNS[2:]


@pytest.mark.parametrize("name", ["glm3", "glm2", "tokenizer"])
def test_too_long_question_is_shortened_within_the_prompt_format(name, request):
    tokenizer = request.getfixturevalue(name)
    system = {"role": "system", "content": "简短。", "loss": False}
    messages = [system, *said("绿茶" * 200, "好。")]
    args = ChatArguments(prompt_column="prompt", max_source_length=90)
    (example,) = encoded(tokenizer, messages, args)
    shortened = without_oldest_turns(tokenizer, messages, 90)
    assert example["source_cut"] and not example["target_cut"]
    assert shortened[0] == system and 0 < len(shortened[1]["content"]) < 400
    assert 80 < len(prompt_ids(tokenizer, shortened[:2])) <= 90
    assert example["input_ids"][: len(prompt_ids(tokenizer, shortened[:2]))] == prompt_ids(tokenizer, shortened[:2])


def test_limit_below_the_prompt_format_is_refused(glm3):
    with pytest.raises(ValueError, match="--max_source_length 3 is .* tokens too short for an empty question"):
        without_oldest_turns(glm3, TURNS[:2], 3)


@pytest.mark.parametrize("name", ["glm3", "tokenizer"])
def test_cut_answer_still_ends(name, request):
    tokenizer = request.getfixturevalue(name)
    messages = said("说", "好茶" * 50)
    whole = trained_ids(encoded(tokenizer, messages, ARGS)[-1])
    args = ChatArguments(prompt_column="prompt", max_target_length=10)
    cut = encoded(tokenizer, messages, args)[-1]
    ending = whole[whole.index(tokenizer.eos_token_id) :]
    assert trained_ids(cut) == whole[:10] + ending and cut["target_cut"]


def test_batch_is_padded_to_its_longest_row():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8] * 9, "labels": [8] * 9}]
    batch = PaddedCollator(pad_token_id=3)(rows)
    assert batch["input_ids"].tolist()[0] == [5, 6, 7] + [3] * 13
    assert batch["labels"].tolist()[0] == [-100, 6, 7] + [-100] * 13
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 9]
    assert {tensor.shape for tensor in batch.values()} == {torch.Size([2, 16])}


def test_padding_does_not_change_the_loss(chatglm3, glm3):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(chatglm3)
    (row,) = encoded(glm3, TURNS)
    short, long = (PaddedCollator(0, length=length)([row]) for length in (len(row["input_ids"]), 200))
    assert torch.allclose(model(**short).loss, model(**long).loss, rtol=1e-6)


def test_rows_without_an_answer_are_dropped_and_named(run, chatglm3, tmp_path, caplog):
    rows = [{"prompt": "问", "response": "答"}, {"prompt": "问", "response": ""}, {"prompt": "问", "response": None}]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"prompt": None, "response": "答"}, rows[0]])
    with caplog.at_level(logging.WARNING):
        folder = run(
            "--model_name_or_path", chatglm3, "--train_file", path, CHAT_FLAGS[:4], "--do_train", "--max_steps", 1
        )
    assert results(folder, "train")["train_samples"] == 2
    assert "3 of 5 train rows have no question or no answer to train on and are dropped: 2, 3, 4" in caplog.text


def test_streamed_rows_without_an_answer_are_dropped_and_named(run, chatglm3, tmp_path, caplog):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data/train.jsonl", [{"prompt": "问", "response": "答"}, {"prompt": "问", "response": ""}])
    flags = ["--dataset_name", tmp_path / "data", "--streaming", CHAT_FLAGS[:4], "--do_train", "--max_steps", 2]
    run("--model_name_or_path", chatglm3, flags)
    assert "train row 2 has no question or no answer and is dropped" in caplog.text


def test_rows_cut_by_a_limit_are_counted_with_the_flag(run, chatglm3, chats, caplog):
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 1]
    run(flags, "--max_target_length", 15, "--max_source_length", 20)
    assert "of the train examples are cut by --max_target_length 15" in caplog.text
    assert "of the train examples are cut by --max_source_length 20" in caplog.text


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--response_column", "respnse"], "The data have no column 'respnse' but .* Did you mean 'response'"),
        ([], "There must be an answer to train on: name its column with --response_column"),
    ],
)
def test_wrong_column_is_named_with_the_nearest(run, chatglm3, chats, flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        run("--model_name_or_path", chatglm3, "--train_file", chats, "--do_train", "--prompt_column", "prompt", flags)


def test_tokenizer_without_a_template_is_refused(run, llama, tokenizer, chats, tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no chat template"):
        run(
            "--model_name_or_path", llama, "--tokenizer_name", tmp_path / "bare", "--train_file", chats,
            "--do_train", "--max_target_length", 16, CHAT_FLAGS,
        )  # fmt: skip


def test_all_rows_are_trained_when_no_evaluation_is_asked_for(run, chatglm3, chats):
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 1]
    assert results(run(flags), "train")["train_samples"] == len(CHATS)
    folder = run(flags, "--do_eval", "--validation_split_percentage", 25, output="split")
    assert results(folder, "train")["train_samples"] == 12 and results(folder, "eval")["eval_samples"] == 4


def test_accuracy_and_loss_of_an_evaluation_count_trained_tokens_only(run, chatglm3, glm3, chats):
    from transformers import AutoModelForCausalLM

    flags = ["--model_name_or_path", chatglm3, "--validation_file", chats, CHAT_FLAGS, "--do_eval"]
    metrics = results(run(flags, "--per_device_eval_batch_size", 3), "eval")
    model, right, total = AutoModelForCausalLM.from_pretrained(chatglm3), 0, 0
    for row in CHATS:
        (example,) = encoded(glm3, conversation(row, ROW, ""))
        labels = torch.tensor(example["labels"])[1:]
        best = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1].argmax(-1)
        right, total = right + (best == labels).sum().item(), total + (labels != IGNORE_INDEX).sum().item()
    assert metrics["eval_accuracy"] == right / total


def test_source_limit_leaves_room_for_the_answer_in_the_positions_of_the_model(caplog):
    config = GPT2Config(n_positions=512)
    assert within_positions(replace(ARGS, max_source_length=376), config).max_source_length == 376
    assert within_positions(ARGS, config).max_source_length == 512 - 128 - 8
    assert "The model has 512 positions: --max_source_length is lowered to 376" in caplog.text
    with pytest.raises(ValueError, match="--max_target_length must be less than 120: the model ends there"):
        within_positions(ARGS, GPT2Config(n_positions=128))


def test_prediction_rows_keep_their_order_and_stop_at_the_limit(run, chatglm3, chats):
    flags = ["--model_name_or_path", chatglm3, "--test_file", chats, CHAT_FLAGS, "--do_predict"]
    folder = run(flags, "--max_predict_samples", 5, "--per_device_eval_batch_size", 2, "--max_target_length", 4)
    rows = [json.loads(line) for line in (folder / "generated_predictions.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["reference"]) for row in rows] == [(r["prompt"], r["response"]) for r in CHATS[:5]]
    one_by_one = run(flags, "--max_predict_samples", 5, "--per_device_eval_batch_size", 1, "--max_target_length", 4)
    assert (one_by_one / "generated_predictions.jsonl").read_text().splitlines() == [
        json.dumps(row, ensure_ascii=False) for row in rows
    ]
    metrics = results(folder, "predict")
    assert metrics["predict_samples"] == 5 and metrics["predict_exact_match"] == 0
