"""Ids and labels against those of the scripts published with the checkpoints; prompts, templates, tools, the cache."""

import gc
import json
import logging
import shutil
from itertools import chain

import pytest
from goldens_io import GOLDENS, recorded_texts
from tiny import CHAT_FLAGS, CHATML, results, said, write_jsonl
from transformers import AutoTokenizer

import run_chatglm_lora
from chatglm import ChatGLM6BTokenizer, ChatGLMTokenizer
from finetuning.batches import IGNORE_INDEX
from finetuning.chat_rows import RowFormat, as_template_takes_them, conversation, split_where_refused
from finetuning.encoding import answers_apart, encoded_conversations, is_complete, prompt_ids, up_to_answers
from run_chatglm_lora import ChatArguments, encoded_prompts


PAIR = RowFormat("prompt_response", "content", "summary", "history")
CONVERSATIONS = RowFormat("messages", messages="conversations")
RECORDED = recorded_texts("train_format")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    shutil.copy(GOLDENS / "tokenizer/v1_tok.model", folder / "ice_text.model")
    shutil.copy(GOLDENS / "tokenizer/v2_tok.model", folder / "tokenizer.model")
    second, third = (ChatGLMTokenizer(str(folder / "tokenizer.model"), generation=f"chatglm{n}") for n in (2, 3))
    return {"v1": ChatGLM6BTokenizer(str(folder / "ice_text.model"), num_image_tokens=0), "v2": second, "v3": third}


def encoded(tokenizer, row, row_format, source=1000, target=1000):
    """The examples of a row."""
    args = ChatArguments(max_source_length=source, max_target_length=target)
    pieces = up_to_answers(conversation(row, row_format, ""), answers_apart(tokenizer))
    return list(chain.from_iterable(encoded_conversations(tokenizer, pieces, args)))


def recorded_rows(golden):
    """(row, ids without the padding, labels beside them) of a recorded batch."""
    named = [name for name in golden["examples"] if name != "history" or golden["history_column"]]
    for number, (ids, labels) in enumerate(zip(golden["input_ids"], golden["labels"], strict=True)):
        end = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + 1
        yield {name: golden["examples"][name][number] for name in named}, ids[:end], labels[:end]


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_prompt_and_response_rows_give_the_ids_of_the_published_script(tokenizers, name):
    tokenizer, compared = tokenizers[name], 0
    for golden in RECORDED[f"{name}_ptuning"]:
        # The script for ChatGLM-6B counts two special tokens as part of the answer.
        target = golden["max_target_length"] - (2 if name == "v1" else 0)
        for row, ids, labels in recorded_rows(golden):
            example = encoded(tokenizer, row, PAIR, target=target)[-1]
            if name == "v1" and golden["history_column"] and not row["history"]:
                continue  # it trains another prompt here than the model's chat and its own evaluation use
            prompt = example["labels"].count(IGNORE_INDEX)
            if prompt > golden["max_source_length"] - (0 if name == "v2" else -2):
                continue  # the question is cut off there
            assert example["input_ids"] == ids
            if name == "v1":  # it also trains the <sop> that ends every prompt and is never generated
                assert labels[prompt - 1] == tokenizer.bos_token_id
                labels = labels[: prompt - 1] + [IGNORE_INDEX] + labels[prompt:]
            assert example["labels"] == labels
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_question_that_the_published_script_cuts_off_is_kept(tokenizers, name):
    golden = RECORDED[f"{name}_ptuning"][3]  # with a history, and room for 9 tokens
    row, ids, _ = list(recorded_rows(golden))[1]
    limit = 30
    (*_, example) = encoded(tokenizers[name], row, PAIR, source=limit, target=50)
    question = tokenizers[name].encode(row["content"], add_special_tokens=False)
    text, cut = (tokenizers[name].decode(part) for part in (example["input_ids"], ids))
    assert tokenizers[name].decode(question) in text and tokenizers[name].decode(question) not in cut
    assert example["labels"].count(IGNORE_INDEX) <= limit


def test_messages_of_chatglm3_give_the_ids_and_labels_of_the_published_script(tokenizers):
    golden = RECORDED["v3_finetune_hf"][0]
    batch, train = golden["batch"]["conversations"], golden["train"]
    for messages, ids, labels in zip(batch, train["input_ids"], train["labels"], strict=True):
        (example,) = encoded(tokenizers["v3"], {"conversations": messages}, CONVERSATIONS)
        assert (example["input_ids"], example["labels"]) == (ids, labels)


def test_prompts_of_evaluation_are_those_of_the_published_script(tokenizers):
    golden = RECORDED["v3_finetune_hf"][0]
    rows = {"conversations": golden["batch"]["conversations"]}
    args = ChatArguments()
    prompts = encoded_prompts(rows, range(2), tokenizers["v3"], CONVERSATIONS, args, "test")
    recorded = golden["eval"]["input_ids"]
    assert prompts["input_ids"] == [recorded[1], recorded[2]]  # it has one for each answer, here each row has one


def test_cut_answer_is_trained_to_end_where_the_published_script_leaves_it_open(tokenizers):
    golden = RECORDED["v3_finetune_hf"][1]
    messages, ids = golden["batch"]["conversations"][0], golden["train"]["input_ids"][0]
    (example,) = encoded(tokenizers["v3"], {"conversations": messages}, CONVERSATIONS, 40, 4)
    assert tokenizers["v3"].eos_token_id not in ids and example["labels"][-1] == tokenizers["v3"].eos_token_id


@pytest.mark.parametrize("number", [0, 1])
def test_conversations_with_tools_are_those_of_chatglm3_s_guide(tokenizers, number):
    golden = RECORDED["v3_multiturn_2023"][number]
    (example,) = encoded(tokenizers["v3"], golden["item"], CONVERSATIONS)
    assert example["input_ids"] == golden["tokens"]
    predicted = golden["loss_masks(prediction of the NEXT token is trained)"]
    assert [int(label != IGNORE_INDEX) for label in example["labels"][1:]] == predicted[:-1]


def test_messages_that_are_not_to_be_trained_have_no_labels(tokenizers, tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bb", "loss": False}]
    messages += [{"role": "user", "content": "c", "loss": True}, {"role": "assistant", "content": "dd"}]
    for each, separate in ((tokenizers["v3"], False), (tokenizer, True)):
        (example,) = encoded(each, {"conversations": messages}, CONVERSATIONS)
        trained = each.decode([label for label in example["labels"] if label != IGNORE_INDEX])
        assert "bb" not in trained and "dd" in trained and "c" in trained
        assert separate == ("<|im_end|>" in trained)


def test_system_message_between_rounds_is_written_where_the_template_takes_it(tokenizers, tokenizer):
    talk = [*said("a door", "a lamp"), {"role": "system", "content": "seven"}, *said("a ferry", "a heron")]
    for each in (tokenizers["v3"], tokenizer):
        (example,) = encoded(each, {"conversations": talk}, CONVERSATIONS)
        assert "seven" in each.decode(example["input_ids"])
        trained = each.decode([label for label in example["labels"] if label != IGNORE_INDEX])
        assert "a lamp" in trained and "a heron" in trained and "seven" not in trained
    for name, model in {"v1": "ChatGLM-6B", "v2": "ChatGLM2"}.items():
        with pytest.raises(ValueError, match=f"Message 3 has role 'system' where {model} needs 'user'"):
            encoded(tokenizers[name], {"conversations": talk}, CONVERSATIONS)


def test_answers_without_loss_are_no_examples_of_their_own(tokenizers):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]
    messages += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    assert len(encoded(tokenizers["v2"], {"conversations": messages}, CONVERSATIONS)) == 1


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = {"name": "f", "arguments": {"n": 3, "c": "高"}}
CALLED = [
    {"role": "system", "content": "", "tools": TOOLS},
    {"role": "user", "content": "q"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": CALL}],
    },
    {"role": "observation", "content": "22"},
]


def test_calls_are_written_as_each_model_writes_them(tokenizers, glm4_checkpoint):
    calls = {"v3": "```python\ntool_call(n=3, c='高')\n```", "glm4": '{"n": 3, "c": "高"}'}
    for name, text in calls.items():
        own = tokenizers.get(name) or AutoTokenizer.from_pretrained(glm4_checkpoint)
        messages, tools = as_template_takes_them(CALLED, own)
        assert tools is None and messages[2] == {"role": "assistant", "content": text, "metadata": "f"}
    with pytest.raises(ValueError, match="chatglm2 has no prompt for calls of tools"):
        as_template_takes_them(CALLED, tokenizers["v2"])


def test_other_templates_get_tools_calls_and_results_as_they_know_them(tokenizer, monkeypatch):
    with_tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    monkeypatch.setattr(tokenizer, "chat_template", with_tools)
    messages, tools = as_template_takes_them(CALLED, tokenizer)
    assert tools == TOOLS and [message["role"] for message in messages] == ["user", "assistant", "tool"]
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    messages, tools = as_template_takes_them(CALLED, tokenizer)
    assert tools is None and messages[0]["content"].endswith(json.dumps(TOOLS, ensure_ascii=False, indent=4))


def test_template_from_a_file_is_used_and_saved(run, llama, tokenizer, chats, tmp_path):
    (tmp_path / "own.jinja").write_text(CHATML.replace("im_start|>", "im_start|>~"), encoding="utf-8")
    flags = ["--model_name_or_path", llama, "--train_file", chats, "--do_train", "--max_steps", 1]
    folder = run(flags, "--max_target_length", 16, "--chat_template", tmp_path / "own.jinja")
    saved = AutoTokenizer.from_pretrained(folder)
    assert "~" in tokenizer.decode(prompt_ids(saved, [{"role": "user", "content": "a"}]))


def test_same_run_takes_the_encoding_from_the_cache_and_any_change_does_not(
    run, chatglm3, chats, caplog, tmp_path, monkeypatch
):
    def encoded_now(*arguments):
        raise InterruptedError

    monkeypatch.setattr(run_chatglm_lora, "loaded_model", encoded_now)
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 1]
    flags += ["--cache_dir", tmp_path / "cache"]

    def caches(*more):
        with pytest.raises(InterruptedError):
            run(flags, *more)
        return len(list((tmp_path / "cache").rglob("cache-*.arrow")))

    with caplog.at_level(logging.ERROR):
        first = caches()
        assert first > 0 and caches() == first
        assert caches("--learning_rate", 1e-3, "--lora_r", 4) == first
        changes = [["--max_source_length", 50], ["--max_target_length", 5], ["--system_prompt", "短"]]
        (tmp_path / "own.jinja").write_text(CHATML)
        changes += [["--chat_template", tmp_path / "own.jinja"]]
        counts = [first] + [caches(*change) for change in changes]
        assert counts == sorted(set(counts)), "every change encodes anew"
    write_jsonl(tmp_path / "other.jsonl", [{"prompt": "a", "response": "b"}])
    assert caches("--train_file", tmp_path / "other.jsonl") > counts[-1]


def test_libraries_are_frozen_while_rows_are_encoded_and_no_longer(run, chatglm3, chats, monkeypatch):
    counts = []

    def counted(*arguments, **options):
        counts.append(gc.get_freeze_count())
        return conversation(*arguments, **options)

    monkeypatch.setattr(run_chatglm_lora.chat_rows, "conversation", counted)
    run("--model_name_or_path", chatglm3, "--train_file", chats, "--do_train", "--preview", 1, "--overwrite_cache")
    assert min(counts) > 0 and gc.get_freeze_count() == 0


@pytest.mark.slow
def test_two_processes_encode_as_one(run, chatglm3, chats):
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 1]
    counts = [results(run(flags, "--overwrite_cache", more), "train")["train_loss"]
              for more in ([], ["--preprocessing_num_workers", 2])]  # fmt: skip
    assert counts[0] == counts[1]


# As Qwen3's and GLM-4.5's: a thought is shown only behind the last question.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1] if loop.index0 < ns.last else m.content }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained_texts(tokenizer, messages):
    examples = encoded(tokenizer, {"conversations": messages}, CONVERSATIONS)
    return [tokenizer.decode([label for label in each["labels"] if label != IGNORE_INDEX]) for each in examples]


def test_every_answer_is_trained_with_its_thought_where_the_history_loses_them(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", THINKING)
    talk = said("q", "<think>t</think>a", "r", "<think>u</think>b")
    assert trained_texts(tokenizer, talk) == ["<think>t</think>a<|im_end|>\n", "<think>u</think>b<|im_end|>\n"]
    plain = said("q", "a", "r", "b")
    assert trained_texts(tokenizer, plain) == ["a<|im_end|>\nb<|im_end|>\n"], "one example where nothing is lost"


def test_reasoning_content_is_written_as_the_template_writes_it_or_refused(tokenizer, tokenizers, monkeypatch):
    question, answer = said("q", "a")
    talk = [question, {**answer, "reasoning_content": "t"}]
    with pytest.raises(ValueError, match="no place for reasoning_content"):
        trained_texts(tokenizer, talk)
    with pytest.raises(ValueError, match="no place for reasoning_content"):
        trained_texts(tokenizers["v3"], talk)
    monkeypatch.setattr(tokenizer, "chat_template", THINKING)
    assert trained_texts(tokenizer, talk) == ["<think>t</think>a<|im_end|>\n"]


def test_content_that_a_template_leaves_out_is_noticed(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML.replace("m.content", "m.content.split('</think>')[-1]"))
    (example,) = encoded(tokenizer, {"conversations": said("q", "<think>t</think>a")}, CONVERSATIONS)
    (whole,) = encoded(tokenizer, {"conversations": said("q", "a")}, CONVERSATIONS)
    assert example["left_out"] and not whole["left_out"]


def test_calls_stay_one_message_unless_the_template_takes_one_at_a_time(tokenizer, monkeypatch):
    calls = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in "fg"]
    talk = [*said("q"), {"role": "assistant", "content": "", "loss": True, "tool_calls": calls}]
    written = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{{ m.content }}"
    monkeypatch.setattr(tokenizer, "chat_template", CHATML.replace("{{ m.content }}", written))
    assert split_where_refused(talk, tokenizer) == talk
    refusal = "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", CHATML.replace("{{ m.content }}", refusal + written))
    assert [m["tool_calls"] for m in split_where_refused(talk, tokenizer)[1:]] == [calls[:1], calls[1:]]


def test_reference_that_is_a_call_is_what_the_model_writes(tokenizers):
    talk = [*said("q"), {"role": "assistant", "tool_calls": [{"function": CALL}]}]
    prompts = encoded_prompts({"conversations": [talk]}, [0], tokenizers["v3"], CONVERSATIONS, ChatArguments(), "test")
    assert "tool_call(n=3, c='高')" in prompts["reference"][0] and prompts["prompt"] == ["q"]


def test_conversation_with_an_empty_answer_is_incomplete():
    assert not is_complete(said("q", "", "r", "b"))
    assert not is_complete(said("q", None, "r", "b"))
    assert is_complete(said("q", "a"))
