"""From files to messages: every format, every file type, and one sentence for each mistake in the data."""

import json
import logging

import pytest
from datasets import Dataset
from tiny import CHATS, ROOT, results, said, write_jsonl

import run_chatglm_lora
from finetuning import chat_rows
from finetuning.chat_rows import KNOWN_COLUMNS, BadRow, RowFormat, columns_of_rows, conversation, format_of
from finetuning.file_rows import read_rows
from run_chatglm_lora import ChatArguments


ARGS = ChatArguments()
PAIR = RowFormat("prompt_response", "prompt", "response", "history")
INSTRUCTION = RowFormat("instruction", "instruction", "output", "history")
MESSAGES = RowFormat("messages", messages="messages")
WEATHER = {"name": "get_weather", "description": "天气", "parameters": {"type": "object", "default": None}}


@pytest.mark.parametrize(
    "columns, flags, expected",
    [
        (["prompt", "response", "history"], {}, PAIR),
        (["input", "target"], {}, RowFormat("prompt_response", "input", "target", "history")),
        (["content", "summary"], {}, RowFormat("prompt_response", "content", "summary", "history")),
        (["instruction", "input", "output"], {}, INSTRUCTION),
        (["conversations", "tools"], {}, RowFormat("messages", messages="conversations")),
        (["messages", "text"], {}, MESSAGES),
        (["text", "label"], {}, None),
        (["prompt", "response"], {"data_format": "text"}, None),
        (["q", "a"], {"prompt_column": "q", "response_column": "a"}, RowFormat("prompt_response", "q", "a")),
        (
            ["task", "input", "result"],
            {"data_format": "instruction", "prompt_column": "task", "response_column": "result"},
            RowFormat("instruction", "task", "result"),
        ),
    ],
)
def test_format_follows_flags_then_known_names_then_is_text(columns, flags, expected):
    assert format_of({"train": columns}, ChatArguments(**flags)) == expected


def test_rows_to_answer_need_no_answer_column():
    assert format_of({"test": ["prompt"]}, ARGS) == PAIR
    assert format_of({"train": ["prompt"]}, ARGS) is None


def test_column_that_is_missing_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"no column 'messages' but \['mesages'\]. Did you mean 'mesages'\?"):
        format_of({"train": ["mesages"]}, ChatArguments(data_format="messages"))


@pytest.mark.parametrize("history", [None, [], "", "[]"])
def test_missing_null_and_empty_histories_are_the_same(history):
    row = {"prompt": "q", "response": "a"}
    assert conversation(row, PAIR, "row 1") == conversation({**row, "history": history}, PAIR, "") == said("q", "a")


def test_history_comes_before_the_question_and_may_be_json_text():
    row = {"prompt": "q", "response": "a", "history": '[["你", "好"]]'}
    assert conversation(row, PAIR, "") == said("你", "好", "q", "a")


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}])
def test_instruction_and_input_are_joined_by_a_newline(empty):
    row = {"instruction": "译", "output": "door"}
    assert conversation({**row, **empty}, INSTRUCTION, "") == said("译", "door")
    assert conversation({**row, "input": "门"}, INSTRUCTION, "") == said("译\n门", "door")


def test_system_message_is_the_row_s_own_or_that_of_the_flag():
    row, role = {"instruction": "谁", "output": "臣妾"}, {"role": "system", "content": "你是甄嬛"}
    assert conversation(row, INSTRUCTION, "", "你是甄嬛") == [{**role, "loss": False}, *said("谁", "臣妾")]
    assert conversation({**row, "system": "你是皇帝"}, INSTRUCTION, "", "你是甄嬛")[0]["content"] == "你是皇帝"


def test_sharegpt_and_openai_rows_are_the_same_conversation():
    turns = {"human": "北京天气", "function_call": '{"name": "get_weather", "arguments": {"city": "北京"}}'}
    turns |= {"observation": "22 度", "gpt": "二十二度"}
    sharegpt = {"conversations": [{"from": role, "value": text} for role, text in turns.items()]}
    call = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}
    openai = [
        {"role": "user", "content": "北京天气"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "22 度"}, {"role": "assistant", "content": "二十二度"},
    ]  # fmt: skip
    messages = conversation({"messages": openai}, MESSAGES, "")
    assert messages == conversation(sharegpt, RowFormat("messages", messages="conversations"), "")
    assert messages[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": {"city": "北京"}}
    assert messages[2] == {"role": "observation", "content": "22 度", "loss": False}


@pytest.mark.parametrize("who, what", [("Role", "Content"), ("from", "content"), ("role", "value"), ("From ", "text")])
def test_keys_of_messages_are_known_in_any_case_and_pairing(who, what):
    listed = [{who: "user", what: "q"}, {who: "assistant", what: "a"}]
    assert conversation({"messages": listed}, MESSAGES, "") == said("q", "a")


@pytest.mark.parametrize("cell", ["9" * 5000, "[" * 100_000])
def test_json_beyond_what_python_reads_is_a_bad_row(cell):
    cells = {"row": f'{{"prompt": "q", "response": {cell}}}', "place": "a.jsonl, line 1", "problem": None}
    with pytest.raises(BadRow, match="a.jsonl, line 1, column 1: not JSON: "):
        conversation(cells, PAIR, "")


def test_thousand_rows_without_an_example_or_a_reference_may_come_first(run, chatglm3, tmp_path):
    ask = write_jsonl(tmp_path / "ask.jsonl", [{"prompt": "q"}] * 1000 + CHATS[:1])
    flags = ["--train_file", write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "response": None}] * 1000 + CHATS[:1])]
    flags += ["--test_file", ask, "--do_predict", "--max_target_length", 1, "--per_device_eval_batch_size", 1001]
    folder = run("--model_name_or_path", chatglm3, "--do_train", "--max_steps", 1, "--no_self_check", flags)
    rows = [json.loads(line) for line in (folder / "generated_predictions.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in rows[999:]] == [None, CHATS[0]["response"]]


def test_tool_turn_is_a_call_and_an_observation():
    turn = {"role": "tool", "name": "f", "parameters": {"n": 3}, "observation": {"t": "高"}, "loss": False}
    call, observation = conversation({"messages": [*said("q"), turn]}, MESSAGES, "")[1:]
    assert (call["role"], call["loss"]) == ("assistant", False)
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": {"n": 3}}
    assert observation == {"role": "observation", "content": '{"t": "高"}', "loss": False}


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "简短"}]])
def test_tools_of_a_row_stand_in_its_first_system_message(system):
    row = {"messages": [*system, *said("q", "a")], "tools": [WEATHER]}
    messages = conversation({"row": json.dumps(row), "place": "", "problem": None}, MESSAGES, "")
    system = {"role": "system", "content": "简短" if system else "", "loss": False, "tools": [WEATHER]}
    assert messages[0] == system
    assert messages[1:] == said("q", "a")


def test_nulls_that_an_arrow_table_adds_leave_no_trace():
    """Rows whose tools have other keys: Arrow gives all rows all keys, and null where there was nothing."""
    given = [
        {"messages": said("q", "a"), "tools": [{"name": "f", "strict": True}]},
        {"messages": [*said("q"), {"role": "assistant", "content": "a", "loss": False}], "tools": [{"name": "g"}]},
    ]
    for before, after in zip(given, Dataset.from_list(given), strict=True):
        assert conversation(after, MESSAGES, "") == conversation(before, MESSAGES, "")


PLACE = r"train row 7, column 'messages', message 2: "


@pytest.mark.parametrize(
    "row, row_format, sentence",
    [
        ({"prompt": {"n": 5}, "response": "a"}, PAIR, r"column 'prompt': .* \(an object\) is found, text is expected"),
        ({"prompt": "q", "response": ["a"]}, PAIR, r"column 'response': \[\"a\"\] \(a list\) is found"),
        ({"prompt": "q", "respnse": "a"}, PAIR, "no column 'response' but .* Did you mean 'respnse'"),
        ({"prompt": "q", "response": "a", "history": [["x"]]}, PAIR, r"column 'history': .* \(a list\) is not a"),
        ({"prompt": "q", "response": "a", "history": "[["}, PAIR, "column 'history': .* is not JSON for a list"),
        ({"prompt": "q", "response": "a", "label": False}, PAIR, r"'label' is false, which says .* \(KTO\)"),
        ({"messages": "none"}, MESSAGES, "a list of messages is expected"),
        ({"messages": []}, MESSAGES, "a list of messages is expected"),
        ({"messages": said("q")}, MESSAGES, r"no message is an answer \(role assistant or gpt\)"),
        ({"messages": [*said("q"), "a"]}, MESSAGES, PLACE + r'"a" \(text\) is found, an object with role and content'),
        ({"messages": [*said("q"), {"role": "assistant", "answer": "a"}]}, MESSAGES,
         PLACE + r"role and content \(or from and value\) are expected, not \['role', 'answer'\]"),
        ({"messages": [*said("q"), {"speaker": "gpt", "content": "a"}]}, MESSAGES, PLACE + "role and content"),
        ({"messages": [*said("q"), {"role": "asistant", "content": "a"}]}, MESSAGES,
         PLACE + "the role 'asistant' is not one of .* Did you mean 'assistant'"),
        ({"messages": [*said("q"), {"role": "assistant", "content": {}}]}, MESSAGES, PLACE + "{} .* is found"),
        ({"messages": [*said("q"), {"role": "assistant", "content": "a", "loss": 0.5}]}, MESSAGES,
         PLACE + "loss must be true, false, 1 or 0"),
        ({"messages": [*said("q"), {"role": "system", "content": "s", "tools": [1]}, *said("r", "a")]}, MESSAGES,
         PLACE + "tools belong to the first message"),
        ({"messages": [*said("q"), {"role": "tool", "parameters": {}}]}, MESSAGES, PLACE + "a call needs a name"),
        ({"messages": [{"role": "system", "content": "", "tools": [1]}, *said("q", "a")], "tools": [2]}, MESSAGES,
         "the tools stand both in the row and in its system message"),
    ],
)  # fmt: skip
def test_bad_row_is_named_by_place_column_and_what_is_expected(row, row_format, sentence):
    with pytest.raises(BadRow, match="train row 7.*" + sentence.removeprefix("train row 7")):
        conversation(row, row_format, "train row 7")


@pytest.mark.parametrize(
    "line, sentence",
    [
        (b'{"prompt": "q"', "line 2, column 15: not JSON"),
        ('{"prompt": "问", "response": "答"}'.encode("gb18030"), "line 2, byte 13: not UTF-8. If it is a Chinese"),
        (b'["prompt"]', r'line 2: \["prompt"\] \(a list\) is found, an object'),
        (b'{"prompt": "q", "response": "a", "prompt": "r"}', "line 2: the key 'prompt' stands twice in one object"),
        (
            b'{"prompt": "q", "response": "a", "history": [{"role": "user", "content": "b", "role": "user"}]}',
            "line 2: the key 'role' stands twice in one object",
        ),
        (
            b'{"prompt": "q", "response": "a", "history": "[{\\"q\\": \\"b\\", \\"a\\": 1, \\"a\\": 2}]"}',
            "line 2, column 'history': the key 'a' stands twice in one object",
        ),
    ],
)
def test_broken_line_is_named(tmp_path, line, sentence):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "q", "response": "a"}\n' + line + b"\n")
    _, cells = read_rows([str(tmp_path / "a.jsonl")])
    with pytest.raises(BadRow, match="a.jsonl, " + sentence):
        conversation(cells, PAIR, "")
    assert columns_of_rows(read_rows([str(tmp_path / "a.jsonl")]))[:2] == ["prompt", "response"]


GOOD = {"messages": said("你好", "你好，我是小茶。"), "tools": None}
BAD = [{"messages": said("问")}, {"messages": [{"role": "boss", "content": "答"}]}, {"mesages": []}]
UNTRAINED = {"messages": [*said("问"), {"role": "assistant", "content": "答", "loss": False}]}
ODD_TURNS = {"messages": said("你好", "你好。")[:1] * 2 + said("", "好")[1:]}


def test_bad_row_stops_the_run_with_its_line(run, chatglm3, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, BAD[1]])
    with pytest.raises(BadRow, match=r"rows.jsonl, line 2, column 'messages', message 1: the role 'boss'"):
        run("--model_name_or_path", chatglm3, "--train_file", path, "--do_train")


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_bad_row_is_found_before_the_weights_are_loaded(run, chatglm3, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(run_chatglm_lora, "loaded_model", lambda *arguments: pytest.fail("weights were loaded"))
    path = write_jsonl(tmp_path / "rows.jsonl", [BAD[1], GOOD])
    with pytest.raises(BadRow, match="rows.jsonl, line 1"):
        run("--model_name_or_path", chatglm3, "--train_file", path, "--do_train", "--max_steps", 1, streaming)


def test_data_set_wins_over_the_files(run, chatglm3, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [GOOD] * 3)
    other = write_jsonl(tmp_path / "other.jsonl", [GOOD])
    flags = ["--model_name_or_path", chatglm3, "--train_file", other, "--do_train", "--max_steps", 1]
    assert results(run(flags, "--dataset_name", folder), "train")["train_samples"] == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_skipped_counted_and_listed_if_asked_for(run, chatglm2, tmp_path, caplog, streaming):
    """ChatGLM2's prompt refuses two questions in a row; that row is found although all are encoded together."""
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, *BAD, UNTRAINED, ODD_TURNS, GOOD])
    flags = ["--model_name_or_path", chatglm2, "--train_file", path, "--do_train", "--max_steps", 1, "--skip_bad_rows"]
    with caplog.at_level(logging.WARNING):
        folder = run(flags, ["--streaming"] * streaming)
    listed = [json.loads(line) for line in (folder / "bad_rows_train.jsonl").read_text().splitlines()]
    places = [row["problem"].removeprefix(f"{path}, ")[:6] for row in listed]
    assert list(dict.fromkeys(places)) == ["line 2", "line 3", "line 4", "line 6"]
    if not streaming:
        assert [json.loads(row["row"]) for row in listed] == [*BAD, ODD_TURNS]
        assert "4 of 7 train rows are bad and left out" in caplog.text
        assert "1 of 7 train rows have no question or no answer to train on and are dropped: 5" in caplog.text
        assert results(folder, "train")["train_samples"] == 2


@pytest.mark.slow
def test_same_conversations_train_alike_from_every_file_type(run, chatglm3, tmp_path):
    pairs = [{"prompt": "你好", "response": "你好。"}, {"prompt": "有绿茶吗", "response": "有龙井。"}] * 2
    write_jsonl(tmp_path / "a.jsonl", pairs)
    (tmp_path / "a.json").write_text(json.dumps(pairs))
    data = Dataset.from_list(pairs)
    data.to_csv(tmp_path / "a.csv")
    data.to_parquet(tmp_path / "a.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", pairs)
    sources = [["--train_file", tmp_path / f"a.{suffix}"] for suffix in ("jsonl", "json", "csv", "parquet")]
    common = ["--model_name_or_path", chatglm3, "--do_train", "--max_steps", 2, "--lora_dropout", 0]
    common += ["--train_sampling_strategy", "sequential", "--per_device_train_batch_size", 4]
    seen = []
    for number, source in enumerate([*sources, ["--dataset_name", folder], ["--dataset_name", folder, "--streaming"]]):
        seen.append(run(common, source, output=f"out{number}") / "trainer_state.json")
    losses = [[entry.get("loss") for entry in json.loads(path.read_text())["log_history"]] for path in seen]
    assert losses == losses[:1] * 6


def test_first_columns_decide_between_text_and_conversations(run, chatglm3, chats, caplog):
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, "--do_train", "--max_steps", 1]
    run(flags)
    assert "Data format: RowFormat(kind='prompt_response', prompt='prompt'" in caplog.text
    run(flags, "--data_format", "text", "--block_size", 16, output="text")
    assert "Data format: text (--data_format text)" in caplog.text


CONVERSATIONS = {
    "query": ({"query": "q", "response": "a", "history": [["x", "y"]]}, said("x", "y", "q", "a")),
    "completion": ({"prompt": "q", "completion": "a"}, said("q", "a")),
    "lists": ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
              said("q", "a")),
    "question": ({"Question": "q", "Answer": "a"}, said("q", "a")),
    "input": ({"input": "q", "output": "a"}, said("q", "a")),
    "dolly": ({"instruction": "q", "context": "c", "response": "a"}, said("q\nc", "a")),
    "chinese": ({"问题": "q", "回答": "a"}, said("q", "a")),
    "bots": ({"conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"},
                                {"from": "Human", "value": "r"}, {"from": "bing", "value": "b"}]},
             said("q", "a", "r", "b")),
    "capitals": ({"messages": [{"role": "User", "content": "q"}, {"role": "Assistant", "content": "a"}]},
                 said("q", "a")),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                            {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}, said("q", "a")),
    "history of messages": ({"prompt": "q", "response": "a", "history": [
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, said("x", "y", "q", "a")),
    "history of pairs": ({"prompt": "q", "response": "a", "history": [{"user": "x", "assistant": "y"}]},
                         said("x", "y", "q", "a")),
    "python": ({"prompt": "q", "response": "a", "history": "[['x', 'y']]"}, said("x", "y", "q", "a")),
    "turns": ({"conversation": [{"system": "s", "input": "q", "output": "a"}]},
              [{"role": "system", "content": "s", "loss": False}, *said("q", "a")]),
    "system": ({"system": "s", "messages": said("q", "a")},
               [{"role": "system", "content": "s", "loss": False}, *said("q", "a")]),
}  # fmt: skip


def read(text, **flags):
    """The messages of a row that a file holds as this text."""
    cells = {
        "row": text if isinstance(text, str) else json.dumps(text, ensure_ascii=False),
        "place": "",
        "problem": None,
    }
    return conversation(cells, format_of({"train": columns_of_rows([cells])}, ChatArguments(**flags)), "")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_rows_of_other_tools_are_the_conversations_that_they_mean(name):
    row, messages = CONVERSATIONS[name]
    assert read(row) == messages


def test_system_column_counts_beside_named_columns_too():
    row = {"system": "s", "q1": "q", "a1": "a"}
    assert read(row, prompt_column="q1", response_column="a1")[0] == {"role": "system", "content": "s", "loss": False}


@pytest.mark.parametrize("key, no, yes", [("weight", 0, 1), ("loss", 0, 1.0), ("train", False, True)])
def test_message_says_by_any_known_key_whether_it_is_trained(key, no, yes):
    first, wrong, second, right = said("q", "bad", "r", "good")
    for message, value in ((wrong, no), (right, yes)):
        del message["loss"]
        message[key] = value
    messages = read({"messages": [first, wrong, second, right]})
    assert [message["loss"] for message in messages] == [False, False, False, True]
    with pytest.raises(BadRow, match=f"{key} must be true, false, 1 or 0"):
        read({"messages": [first, {**right, key: "yes"}]})


def test_examples_in_a_prompt_of_messages_are_not_trained():
    messages = read({"prompt": [*said("x", "y"), *said("q")], "completion": "a"})
    assert [(m["content"], m["loss"]) for m in messages] == [("x", False), ("y", False), ("q", False), ("a", True)]


def test_assistant_that_speaks_first_is_not_trained():
    greeting = {"role": "assistant", "content": "hello"}
    assert [m["loss"] for m in read({"messages": [greeting, *said("q", "a")]})] == [False, False, True]


@pytest.mark.parametrize(
    "text, meant", [("2", "2"), ("2.50", "2.50"), ("1e3", "1e3"), ("true", "true"), ("NaN", None), ("null", None)]
)
def test_value_where_text_is_expected_is_what_the_file_writes(text, meant):
    assert read(f'{{"instruction": "q", "output": {text}}}')[-1]["content"] == meant


def test_two_calls_in_one_message_are_one_message():
    calls = [{"id": f"c{n}", "function": {"name": "f", "arguments": f'{{"n": {n}}}'}} for n in (1, 2)]
    talk = [*said("q"), {"role": "assistant", "content": None, "tool_calls": calls}]
    *_, answer = read({"messages": talk})
    assert [call["function"]["arguments"] for call in answer["tool_calls"]] == [{"n": 1}, {"n": 2}]
    assert answer["tool_calls"][0]["id"] == "c1" and answer["loss"]


@pytest.mark.parametrize(
    "row, sentence",
    [
        ('{"instruction": "\\ud83d q", "output": "a"}', r"column 18: .*ud83d is half a character"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, *said("q", "a")[1:]]},
            "type 'image_url'",
        ),
        ({"prompt": "q", "response": ["a", "b"]}, "--skip_bad_rows"),
        ({"messages": said("q", "a"), "tools": "the weather"}, "column 'tools': .* is not JSON"),
        (
            {"system": "s", "messages": [{"role": "system", "content": "t"}, *said("q", "a")]},
            "has a system message and",
        ),
        ({"messages": [*said("q"), {"role": "assistant", "content": "a", "loss": 1, "weight": 0}]}, "contradict"),
    ],
)
def test_what_cannot_be_meant_is_refused(row, sentence):
    with pytest.raises(BadRow, match=sentence):
        read(row)


def test_pair_of_escapes_is_a_character():
    assert read('{"prompt": "\\ud83d\\ude00 \\\\ud83d", "response": "a"}')[0]["content"] == "\U0001f600 \\ud83d"


def test_columns_without_known_names_are_no_text(run, chatglm3, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"ask": "q", "reply": "a"}] * 3)
    with pytest.raises(ValueError, match=r"columns \['ask', 'reply'\], whose names are not known.*--prompt_column"):
        run("--model_name_or_path", chatglm3, "--train_file", path, "--do_train")


def test_row_that_is_one_message_is_no_text():
    with pytest.raises(ValueError, match="each is a message and not a conversation"):
        read({"role": "user", "content": "q"})


def test_preference_data_say_how_their_chosen_answers_are_trained():
    answers = {"chosen": "a", "rejected": "b"}
    for row, way_out in {
        ("Prompt",): "ones: --prompt_column 'Prompt' --response_column 'chosen'",
        (): "ones: rename 'chosen' to messages where it is a list of them, to text otherwise",
        ("conversations",): "ones: write the chosen answer as the last message of 'conversations'",
    }.items():
        with pytest.raises(ValueError, match=f"are preference data \\(DPO\\), .* To train the chosen {way_out}"):
            read(dict.fromkeys(row, "q") | answers)
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(BadRow, match="column 'chosen': a whole conversation is found, an answer is expected"):
        read({"prompt": "q", "chosen": talk, "rejected": talk}, prompt_column="prompt", response_column="chosen")


def test_validation_rows_of_another_format_are_refused():
    with pytest.raises(ValueError, match="validation data are not in the format of the train data"):
        format_of({"train": ["messages"], "validation": ["prompt", "response"]}, ARGS)


def test_documents_and_help_show_the_table_of_columns():
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    for names in (names for kind in KNOWN_COLUMNS.values() for names in kind):
        assert f"`{'/'.join(names)}`" in page
        assert "/".join(names) in ChatArguments.__dataclass_fields__["data_format"].metadata["help"]


def test_files_are_mixed_by_shares_and_every_row_is_seen(tmp_path):
    large = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"a{n}", "response": "r"} for n in range(60)])
    small = write_jsonl(tmp_path / "b.jsonl", [{"prompt": f"b{n}", "response": "r"} for n in range(5)])
    args = ChatArguments(interleave_probabilities="0.7,0.3")
    raw, _ = chat_rows.read({"train": [large, small]}, args, False, str(tmp_path / "cache"))
    prompts = [json.loads(row)["prompt"] for row in raw["train"]["row"]]
    assert len(set(prompts)) == 65 and 0.2 < sum(p[0] == "b" for p in prompts) / len(prompts) < 0.4
    args.interleave_probabilities = "0.7,0.2"
    with pytest.raises(ValueError, match="2 numbers from 0.001 on that add up to 1"):
        chat_rows.read({"train": [large, small]}, args, False, str(tmp_path / "cache"))


def test_too_few_rows_to_evaluate_on_are_a_sentence(run, chatglm3, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, GOOD])
    with pytest.raises(ValueError, match="--do_eval: too few training rows to hold any out"):
        run("--model_name_or_path", chatglm3, "--train_file", path, "--do_eval")


@pytest.mark.parametrize("notes", [5, {"source": "forum"}, ["a"], "", None])
def test_metadata_that_is_no_text_is_a_note_of_another_program(notes):
    question = {"role": "user", "content": "hi"}
    cells = {"messages": [question, {"role": "assistant", "content": "x", "metadata": notes}]}
    found = chat_rows.conversation(cells, chat_rows.RowFormat("messages", messages="messages"), "row 1")
    assert found[-1] == {"role": "assistant", "content": "x", "loss": True}
