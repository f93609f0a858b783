"""chat and stream_chat against the inputs and answers recorded from the published models."""

import json

import pytest
import torch
from goldens_io import recorded_texts
from transformers import AutoTokenizer

from chatglm import ChatGLMForConditionalGeneration
from chatglm.chat import FiniteScores, python_call_arguments


FILES = {"v2": "tok_v2", "v3": "tok_v3", "glm4": "tok_glm4-1m"}
GREEDY = {"do_sample": False, "top_p": None, "temperature": None}


@pytest.fixture(scope="module")
def recorded(version):
    return recorded_texts(FILES[version])["chat"]


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder, tokenizer):
    """Resized, as the vocabularies of the recorded weights are smaller than those of the recorded texts."""
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration.from_pretrained(folder).eval()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def as_recorded(history: list) -> list:
    return [tuple(turn) if isinstance(turn, list) else turn for turn in history]


@pytest.mark.oldest
def test_chat_gives_the_recorded_inputs_and_answers(model, tokenizer, recorded, monkeypatch):
    chats = [chat for chat in recorded if "input" in chat]
    for chat in chats:
        seen = {}
        prompt = torch.tensor(chat["input"]["input_ids"])
        reply = chat.get("fake_output_ids", [13, 2])

        def generate(seen=seen, prompt=prompt, reply=reply, **inputs):
            seen.update(inputs)
            return torch.cat((prompt, torch.tensor([reply])), dim=1)

        monkeypatch.setattr(model, "generate", generate)
        history = as_recorded(chat["history"])
        before = json.dumps(history)
        response, new_history = model.chat(tokenizer, chat["query"], history, chat.get("role", "user"))
        for name, expected in chat["input"].items():
            assert seen[name].tolist() == expected
        for name, expected in chat.get("gen_kwargs", {}).items():
            assert seen[name] == expected
        assert json.dumps(history) == before
        assert len(new_history) > len(history)
        if "response" in chat:
            assert response == chat["response"]
            assert new_history == [*history, (chat["query"], response)]


def test_chat_of_glm4_gives_the_recorded_prompts(glm4_folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(glm4_folder)
    model = ChatGLMForConditionalGeneration.from_pretrained(glm4_folder)
    recorded = recorded_texts("tok_glm4")["chat"]
    for chat in (chat for chat in recorded if chat.get("add_generation_prompt")):
        prompt = chat["result"]["input_ids"]
        reply = [10, *tokenizer.encode("晴", add_special_tokens=False), 907]
        seen = {}

        def generate(seen=seen, prompt=prompt, reply=reply, **inputs):
            seen.update(inputs)
            return torch.tensor([prompt + reply])

        monkeypatch.setattr(model, "generate", generate)
        *history, last = chat["messages"]
        response, messages = model.chat(tokenizer, last["content"], history, last["role"])
        assert seen["input_ids"].tolist() == [prompt]
        assert seen["eos_token_id"] == [900, 907, 909]
        assert response == "晴"
        assert messages == [*chat["messages"], {"role": "assistant", "metadata": "", "content": "晴"}]


def test_replies_are_read_as_recorded(model, recorded):
    replies = [reply for reply in recorded if "process_response_input" in reply]
    for reply in replies:
        before = json.dumps(reply["history"])
        response, history = model.process_response(reply["process_response_input"], reply["history"])
        assert (response, history) == (reply["response"], reply["history_out"])
        assert json.dumps(reply["history"]) == before


def test_tool_calls_are_data():
    assert python_call_arguments("```python\ntool_call(a=1, b='x', c=[1, {'d': None}])\n```") == {
        "a": 1,
        "b": "x",
        "c": [1, {"d": None}],
    }
    for text in (
        "__import__('os').system('true')",
        "tool_call(a=open('x'))",
        "tool_call(1)",
        "tool_call(",
        "a = 1",
        "tool_call(**{'a': 1})",
    ):
        assert python_call_arguments(f"```python\n{text}\n```") is None


@pytest.mark.parametrize("version", ["v3", "glm4"])
def test_unreadable_tool_call_is_given_as_it_is(version, request):
    folder = request.getfixturevalue(f"{version}_folder")
    model = ChatGLMForConditionalGeneration.from_pretrained(folder)
    history = [{"role": "system", "content": "", "tools": [{}]}]
    response, _ = model.process_response("f\n```python\ntool_call(a=b)\n```", history)
    assert response == {"name": "f", "content": "```python\ntool_call(a=b)\n```"}


@pytest.mark.oldest
def test_stream_ends_with_the_answer_of_chat(model, tokenizer):
    options = {"max_new_tokens": 12, **GREEDY}
    expected = model.chat(tokenizer, "你好", **options)
    steps = list(model.stream_chat(tokenizer, "你好", **options))
    assert 1 <= len(steps) <= 12
    assert steps[-1] == expected or expected[0].endswith("\ufffd")
    second = model.chat(tokenizer, "a b", expected[1], **options)[1]
    assert second[: len(expected[1])] == expected[1]


def test_stream_goes_on_from_its_cache(model, tokenizer):
    options = {"max_new_tokens": 6, **GREEDY, "return_past_key_values": True}
    *_, (_, history, cache) = model.stream_chat(tokenizer, "你好", **options)
    seen = cache.get_seq_length()
    *_, (_, longer, same) = model.stream_chat(tokenizer, "a b", history, past_key_values=cache, **options)
    assert same is cache
    messages = model.chat_messages("a b", history)
    assert cache.get_seq_length() <= seen + len(tokenizer.continuation_of_chat(messages)) + 6
    assert longer[: len(history)] == history


def test_continued_prompt_of_chatglm2_equals_the_original(v2_folder):
    tokenizer = AutoTokenizer.from_pretrained(v2_folder)
    model = ChatGLMForConditionalGeneration.from_pretrained(v2_folder)
    chats = recorded_texts("tok_v2")["chat"]
    for chat in chats:
        if "stream_continue_input" in chat:
            messages = model.chat_messages("next question", chat["history"])
            assert [tokenizer.continuation_of_chat(messages)] == chat["stream_continue_input"]["input_ids"]


def test_a_stream_left_early_stops_generating(model, tokenizer):
    stream = model.stream_chat(tokenizer, "你好", max_new_tokens=100_000, **GREEDY)
    next(stream)
    stream.close()  # waits for the thread


def test_errors_of_generate_reach_the_listener(model, tokenizer):
    with pytest.raises(ValueError):
        list(model.stream_chat(tokenizer, "你好", max_length=2, num_beams=2))


def test_infinite_scores_fall_back_to_one_token():
    scores = torch.tensor([[0.0, 1.0, 2.0, float("nan"), 0.0, 0.0]])
    assert FiniteScores(5)(None, scores).argmax().item() == 5
    finite = torch.zeros(1, 6)
    assert FiniteScores(5)(None, finite) is finite
