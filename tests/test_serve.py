"""scripts/serve.py: OpenAI's own client against it. Skipped where the packages that it needs are missing."""

import threading
import time

import pytest
import torch
from answering.chatbot import Chatbot
from answering.opening import opened
from trained import write_adapter

from finetuning.encoding import prompt_ids


openai = pytest.importorskip("openai", reason="its client asks the server: pip install openai")
uvicorn = pytest.importorskip("uvicorn", reason="serve.py needs uvicorn, starlette and pydantic")
from answering import chatbot, completions  # noqa: E402


QUESTION = {"role": "user", "content": "which tea have you got?"}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}]


def started(app):
    """A running server and its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return server, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"


@pytest.fixture(scope="module")
def bot(chatglm3):
    return Chatbot(*opened(chatglm3), {"max_new_tokens": 200, "do_sample": False})


@pytest.fixture(scope="module")
def address(bot):
    server = completions.Server(bot, "tea", "secret", longest_queue=1, longest_prompt=400)
    server, url = started(server.app(("127.0.0.1", "localhost")))
    yield url
    server.should_exit = True


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=address, api_key="secret", max_retries=0)


def asked(client, messages, **options):
    return client.chat.completions.create(model="tea", messages=messages, **{"max_tokens": 9, **options})


def expected(bot, messages, length=9):
    """What the model says to a conversation, without the server."""
    ids = prompt_ids(bot.tokenizer, messages)
    given = torch.tensor([ids])
    options = {**bot.options, "max_new_tokens": length}
    reply = bot.model.generate(given, attention_mask=torch.ones_like(given), **options)[0, len(ids) :]
    return bot.tokenizer.decode(reply, skip_special_tokens=True).strip(), len(ids)


def test_answers_are_the_model_s_to_the_prompt_of_training_also_with_the_history_that_came_back(client, bot):
    messages = []
    for question in (QUESTION, {"role": "user", "content": "and cake?"}):
        messages.append(question)
        completion = asked(client, messages)
        (choice,) = completion.choices
        text, length = expected(bot, messages)
        assert (choice.message.content, choice.finish_reason, choice.message.role) == (text, "length", "assistant")
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (length, 9)
        messages.append(choice.message.model_dump(exclude_none=True))


def test_streamed_answer_is_the_whole_one_in_pieces(client, bot):
    text, length = expected(bot, [QUESTION])
    *chunks, last = asked(client, [QUESTION], stream=True, stream_options={"include_usage": True})
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == text and len(list(filter(None, pieces))) > 2
    assert chunks[-1].choices[0].finish_reason == "length" and not last.choices
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (length, 9)


def test_stop_string_ends_an_answer_and_is_not_part_of_it_streamed_or_not(client, bot):
    text, _ = expected(bot, [QUESTION], 40)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    whole = asked(client, [QUESTION], max_tokens=40, stop=[stop, "never said"])
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    assert whole.usage.completion_tokens < 40
    chunks = list(asked(client, [QUESTION], max_tokens=40, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[: text.index(stop)]
    assert completions.settled("a <|us", ["<|user|>", "b"]) == "a "


def test_sampled_answers_are_repeated_by_their_seed(client):
    seeds = [
        asked(client, [QUESTION], temperature=1.5, top_p=0.9, seed=s).choices[0].message.content for s in (1, 1, 2)
    ]
    assert seeds[0] == seeds[1] != seeds[2]
    cold = [asked(client, [QUESTION], temperature=0, seed=s).choices[0].message.content for s in (1, 2)]
    assert cold[0] == cold[1]
    coldest = asked(client, [QUESTION], temperature=1e-40)  # by which a score can not be divided
    assert coldest.choices[0].message.content == cold[0]


def test_call_of_a_tool_and_its_result_are_those_of_training(client, bot, monkeypatch):
    text = "weather\n```python\ntool_call(city='Paris')\n```"
    ids = bot.tokenizer.encode(text, add_special_tokens=False)
    said = [*ids, bot.tokenizer.convert_tokens_to_ids("<|observation|>")]
    with monkeypatch.context() as patch:
        patch.setattr(chatbot, "generated_ids", lambda *_, **__: iter(said))
        (choice,) = asked(client, [QUESTION], tools=TOOLS).choices
        chunks = list(asked(client, [QUESTION], tools=TOOLS, stream=True))
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris"}')
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "tool_calls"
    assert chunks[1].choices[0].delta.tool_calls[0].function.name == "weather"

    result = {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}
    given = [QUESTION, choice.message.model_dump(exclude_none=True), result]
    usage = asked(client, given, tools=TOOLS).usage
    written = [
        {"role": "system", "content": completions.chat_rows.TOOLS_PROMPT, "tools": TOOLS},
        QUESTION,
        {"role": "assistant", "metadata": "weather", "content": text.partition("\n")[2]},
        {"role": "observation", "content": "12 degrees"},
    ]
    prompt = bot.tokenizer.apply_chat_template(written, add_generation_prompt=True)["input_ids"]
    assert usage.prompt_tokens == len(prompt)


BAD = {
    "messages: List should have at least 1 item": {"messages": []},
    "message 1: the role 'wizard' is not one of system": {"messages": [{"role": "wizard", "content": "hi"}]},
    "the last message must be a question": {"messages": [QUESTION, {"role": "assistant", "content": "hi"}]},
    "a part of the type 'image_url'": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "message 1: role and content": {"messages": [{"role": "user"}]},
    "temperature: Input should be less than or equal to 2": {"temperature": 3},
    "n: Input should be 1": {"n": 2},
    "max_tokens: Input should be a valid integer": {"max_tokens": "5"},
    "stream: Input should be a valid boolean": {"extra_body": {"stream": 1}},
    "tools: each must be an object with a function that has a name": {"tools": [{"type": "function"}]},
    "frequency_penalty: Input should be less": {"frequency_penalty": 0.5},
    "guided_json: Extra inputs are not permitted": {"extra_body": {"guided_json": {}}},
    "max_tokens: 201 is more than the server makes, 200": {"max_tokens": 201},
    "tokens long, more than the server takes, 400": {"messages": [{"role": "user", "content": "tea " * 900}]},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_request_is_refused_with_its_reason(sentence, client):
    with pytest.raises(openai.BadRequestError) as error:
        asked(client, **{"messages": [QUESTION], **BAD[sentence]})
    assert sentence in error.value.message


def test_key_name_of_the_model_and_of_the_host_are_checked(client, address):
    assert [model.id for model in client.models.list()] == ["tea"] and client.models.retrieve("tea").id == "tea"
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here, but 'tea' is"):
        client.chat.completions.create(model="gpt-4", messages=[QUESTION])
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        openai.OpenAI(base_url=address, api_key="guessed").models.list()
    elsewhere = {"Host": "elsewhere.example"}
    with pytest.raises(openai.BadRequestError):
        openai.OpenAI(base_url=address, api_key="secret", default_headers=elsewhere).models.list()
    with pytest.raises(openai.APIStatusError, match="application/json") as error:  # all that a page elsewhere can send
        asked(client, [QUESTION], extra_headers={"Content-Type": "text/plain"})
    assert error.value.status_code == 415
    asked(client, [QUESTION], extra_headers={"Content-Type": "Application/JSON; charset=utf-8"})
    with pytest.raises(openai.APIStatusError, match="longer than") as error:
        asked(client, [{"role": "user", "content": "x" * completions.LONGEST_BODY}])
    assert error.value.status_code == 413


def test_too_many_requests_are_turned_away_and_one_that_is_given_up_makes_room(client, bot, monkeypatch):
    whole, steps = bot.model.generate, []

    def slow(*args, **options):
        watch = lambda ids, scores, **_: (steps.append(time.sleep(0.05)), torch.tensor([False]))[1]  # noqa: E731
        options["stopping_criteria"].insert(0, watch)
        return whole(*args, **options)

    monkeypatch.setattr(bot.model, "generate", slow)
    answering = asked(client, [QUESTION], max_tokens=200, stream=True)
    next(iter(answering))
    waiting = threading.Thread(target=asked, args=(client, [QUESTION]), kwargs={"max_tokens": 2})
    waiting.start()
    time.sleep(0.2)
    with pytest.raises(openai.RateLimitError, match="1 requests are waiting already"):
        asked(client, [QUESTION])
    answering.close()
    waiting.join(timeout=20)
    assert not waiting.is_alive() and len(steps) < 200
    assert asked(client, [QUESTION], max_tokens=2).usage.completion_tokens == 2


def test_failure_of_the_model_is_told_and_the_next_request_is_answered(client, bot, monkeypatch):
    for place, name in ((bot.model, "generate"), (completions, "prompt_of")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, lambda *_, **__: 1 / 0)
            with pytest.raises(openai.InternalServerError, match="ZeroDivisionError: see the log"):
                asked(client, [QUESTION])
    assert asked(client, [QUESTION]).usage.completion_tokens == 9


@pytest.mark.slow
def test_stock_server_takes_the_answers_of_a_native_export_back(chatglm3, merge, tmp_path):
    pytest.importorskip("fastapi", reason="transformers serve needs it")
    from transformers.cli.serve import Serve

    folder, _ = merge(write_adapter(chatglm3, tmp_path / "adapter"), "--format", "native")
    server = Serve(str(folder), device="cpu", port=0, non_blocking=True)
    try:
        while not server.server.started:
            time.sleep(0.01)
        address = f"http://127.0.0.1:{server.server.servers[0].sockets[0].getsockname()[1]}/v1"
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        ours, messages = Chatbot(*opened(str(tmp_path / "adapter")), {"max_new_tokens": 9, "do_sample": False}), []
        for question in (QUESTION, {"role": "user", "content": "and cake?"}):
            messages.append(question)
            completion = client.chat.completions.create(
                model=str(folder), messages=messages, max_tokens=9, temperature=0
            )
            text, length = expected(ours, [{**each, "content": each["content"].strip()} for each in messages])
            answer = completion.choices[0].message.content
            assert (answer.strip(), completion.usage.prompt_tokens) == (text, length)
            messages.append({"role": "assistant", "content": "\n " + answer})  # as a trained one begins
    finally:
        server.kill_server()
