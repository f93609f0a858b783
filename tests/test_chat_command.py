"""scripts/chat.py in the terminal and in pipes."""

import argparse
import io
import json
import os
import shutil
import signal
import sys
import threading
import time

import chat
import pytest
import serve
import torch
from answering import chatbot, loading, terminal
from answering.opening import opened
from peft import AutoPeftModelForCausalLM
from processes import forked_program
from tiny import ROOT
from trained import write_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def run_chat(monkeypatch, capsys):
    """Runs main() on a command line with the given input; returns standard output and standard error."""

    def run(*flags, typed=""):
        monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, flags), "--device", "cpu"])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()  # of the fixtures
        chat.main()
        return capsys.readouterr()

    return run


@pytest.fixture
def asked(monkeypatch):
    """The conversations that are answered; the answers are "answer 1", "answer 2", ..."""
    conversations = []

    def answer(self, ids):
        for text in ("answer", f"answer {len(conversations)}"):
            yield {"role": "assistant", "content": text}

    def prompt(self, messages):
        conversations.append([(message["role"], message["content"]) for message in messages])
        return [1], 0

    monkeypatch.setattr(loading, "QUESTIONS", [])  # of the self-check, which has tests of its own
    monkeypatch.setattr(loading, "check_answers", lambda *_: None)
    monkeypatch.setattr(chatbot.Chatbot, "answer", answer)
    monkeypatch.setattr(chatbot.Chatbot, "prompt", prompt)
    return conversations


def greedy(model, tokenizer, messages, count):
    """The greedy answer, by generate alone."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    stops = getattr(tokenizer, "stop_token_ids", tokenizer.eos_token_id)
    ids = model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=stops)[0, prompt.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("generation", ["chatglm1", "chatglm2", "chatglm3", "glm4_checkpoint", "llama"])
def test_answer_to_a_prompt_is_all_of_standard_output(generation, run_chat, request):
    base = request.getfixturevalue(generation)
    output = run_chat(base, "--prompt", "碧螺春多少钱？", "--max_new_tokens", 12, "--no_do_sample")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    expected = greedy(model, tokenizer, [{"role": "user", "content": "碧螺春多少钱？"}], 12).rstrip("\ufffd")
    assert output.out == expected + "\n"
    assert expected or generation == "chatglm1"  # whose random weights, with tied embeddings, repeat <sop>
    assert f"Loading {base} on cpu" in output.err


def test_adapter_is_found_with_its_base_and_the_tokenizer_of_its_training(chatglm3, run_chat, tmp_path):
    adapter = write_adapter(chatglm3, tmp_path / "adapter", target_modules=["query_key_value", "dense_4h_to_h"])
    tokenizer = AutoTokenizer.from_pretrained(chatglm3)
    tokenizer.save_pretrained(adapter)
    flags = ["--prompt", "你好", "--max_new_tokens", 12, "--system", "s"]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "你好"}]
    expected = greedy(AutoPeftModelForCausalLM.from_pretrained(adapter), tokenizer, messages, 12)
    assert run_chat(adapter, *flags).out.strip() == expected.rstrip("\ufffd")
    assert run_chat(chatglm3, *flags).out.strip() != expected
    moved = tmp_path / "moved"
    os.rename(adapter, moved)
    (moved / "adapter_config.json").write_text(
        (moved / "adapter_config.json").read_text().replace(chatglm3, "/nowhere/chatglm3")
    )
    with pytest.raises(SystemExit, match="is not at /nowhere/chatglm3 any more: pass its place with --base_model"):
        run_chat(moved, *flags)
    assert run_chat(moved, *flags, "--base_model", chatglm3).out.strip() == expected.rstrip("\ufffd")


def test_pipe_gets_the_answer_alone_from_any_folder(llama, tmp_path):
    words = [llama, "--prompt", "-", "--max_new_tokens", 8]
    result = forked_program(ROOT / "scripts/chat.py", *words, cwd=tmp_path, typed="the lamps")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    expected = greedy(model, tokenizer, [{"role": "user", "content": "the lamps"}], 8)
    assert (result.returncode, result.stdout) == (0, expected.rstrip("\ufffd") + "\n")


def test_turns_build_on_each_other_until_cleared(chatglm3, run_chat, asked):
    typed = "one\ntwo\n/clear\nthree\n/system be brief\nfour\n/system\nfive\n\n/exit\nnever asked\n"
    output = run_chat(chatglm3, "--system", "s", typed=typed).out
    system, brief = ("system", "s"), ("system", "be brief")
    assert asked == [
        [system, ("user", "one")],
        [system, ("user", "one"), ("assistant", "answer 1"), ("user", "two")],
        [system, ("user", "three")],
        [brief, ("user", "four")],
        [("user", "five")],
    ]
    assert "answer 1\n" in output and "answer 5\n" in output


def test_question_of_several_lines(chatglm3, run_chat, asked):
    run_chat(chatglm3, typed='first \\\nsecond\\\nthird\n"""\ncode:\n  x = 1\n"""\n"""one line"""\n')
    questions = [conversation[-1][1] for conversation in asked]
    assert questions == ["first \nsecond\nthird", "code:\n  x = 1", "one line"]


def test_end_of_the_input_ends_a_question_too(chatglm3, run_chat, asked):
    for typed in ('"""first\nsecond\n', "first\\\nsecond\\", "first\\\nsecond"):
        assert run_chat(chatglm3, typed=typed).out == f"answer {len(asked)}\n"
        assert asked[-1] == [("user", "first\nsecond")]


def test_saved_row_begins_a_line_and_goes_behind_no_json_list(tmp_path):
    path = tmp_path / "rows.jsonl"
    for before, after in (("", "new\n"), ("old", "old\nnew\n"), ("old\n", "old\nnew\n")):
        path.write_text(before)
        terminal.append_row(path, "new\n")
        assert path.read_text() == after
    path.write_text("\ufeff [{}]", encoding="utf-8")
    with pytest.raises(ValueError, match="is a JSON list, not a file with a row a line"):
        terminal.append_row(path, "new\n")
    assert path.read_text(encoding="utf-8") == "\ufeff [{}]"


def test_conversation_is_saved_as_a_training_row(chatglm3, run_chat, asked, tmp_path):
    path = tmp_path / "rows.jsonl"
    typed = f"/save {path}\n一\n/save\n/save {path}\n/clear\ntwo\n/save {path}\n/save {tmp_path}/no/rows.jsonl\n"
    output = run_chat(chatglm3, typed=typed).out
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"answer {n}"}]}
        for n, q in ((1, "一"), (2, "two"))
    ]
    assert "No answer yet" in output and "name the file" in output and "Not saved: [Errno 2]" in output


def test_unknown_command_is_named_with_those_that_there_are(chatglm3, run_chat, asked):
    output = run_chat(chatglm3, typed="/what is this\n/help\n").out
    assert output == f"{output.splitlines()[0]}\n{terminal.HELP}\n{terminal.HELP}\n" and "no command /what." in output
    assert asked == []


def test_questions_from_a_pipe_give_the_answers_alone(chatglm3, run_chat, asked):
    assert run_chat(chatglm3, typed="one\ntwo\n").out == "answer 1\nanswer 2\n"


def test_undo_takes_a_turn_back_and_regenerate_answers_again(chatglm3, run_chat, asked):
    output = run_chat(chatglm3, typed="/undo\none\ntwo\n/undo\nthree\n/regenerate\n/regenerate\n").out
    first = [("user", "one"), ("assistant", "answer 1")]
    assert asked[1:] == [[*first, ("user", "two")], *[[*first, ("user", "three")]] * 3]
    assert output.startswith("(No answer yet.)\n")


def test_ctrl_c_stops_the_answer_and_not_the_program(llama, run_chat, monkeypatch):
    generated, counts = chatbot.generated_ids, []

    def interrupted(model, **options):
        counts.append(0)
        for token in generated(model, **{**options, "min_new_tokens": 60, "max_new_tokens": 60}):
            counts[-1] += 1
            yield token
            if len(counts) == 1 and counts[0] == 20:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)  # the main thread takes the signal; this one may be in another

    monkeypatch.setattr(chatbot, "generated_ids", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background begins with it ignored
    threads = threading.active_count()
    output = run_chat(llama, typed="the\na\n")
    assert counts == [20, 60] and "(stopped)" in output.out
    assert threading.active_count() == threads  # no generation goes on


def test_ctrl_c_at_the_prompt_says_how_to_leave(chatglm3, run_chat, asked, monkeypatch):
    lines = iter([KeyboardInterrupt, "one"])

    def entered(cue):
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(terminal, "entered", entered)
    assert "/exit or Ctrl-D leaves" in run_chat(chatglm3).out
    assert len(asked) == 1


@pytest.mark.parametrize("generation", ["chatglm3", "glm4_checkpoint"])
def test_streamed_text_is_the_answer_with_every_blank(generation, request, monkeypatch):
    model, tokenizer = opened(request.getfixturevalue(generation))
    bot = chatbot.Chatbot(model, tokenizer, {"max_new_tokens": 50})
    text = "def f(x):\n    return x  # 一\n\n  好"
    reply = tokenizer.encode("\n" + text, add_special_tokens=False) + [tokenizer.eos_token_id]
    monkeypatch.setattr(chatbot, "generated_ids", lambda model, **options: iter(reply))
    contents = [message["content"] for message in bot.answer([1, 2])]
    assert contents[-1] == text
    assert all(later.startswith(earlier) for earlier, later in zip(contents, contents[1:], strict=False))
    assert not any("\ufffd" in content for content in contents)


@pytest.mark.parametrize("generation", ["chatglm3", "glm4_checkpoint"])
def test_call_of_a_tool_and_its_result_go_into_the_history(generation, request, run_chat, monkeypatch, tmp_path):
    base = request.getfixturevalue(generation)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tools = [{"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    call = '{"city": "北京"}'
    replies = [
        [
            *tokenizer.encode("weather", add_special_tokens=False),
            *tokenizer.encode("\n" + call, add_special_tokens=False),
        ],
        tokenizer.encode("\n晴", add_special_tokens=False),
    ]
    ends, prompts = tokenizer.convert_tokens_to_ids(["<|observation|>", "<|user|>"]), []

    def scripted(model, input_ids, **options):
        prompts.append(input_ids[0].tolist())
        return iter([*replies[len(prompts) - 1], ends[len(prompts) - 1]])

    monkeypatch.setattr(chatbot, "generated_ids", scripted)
    saved = tmp_path / "rows.jsonl"
    typed = f"天气？\n25 degrees\n/save {saved}\n"
    output = run_chat(base, "--tools", tmp_path / "tools.json", typed=typed).out
    messages = [
        {"role": "user", "content": "天气？"},
        {"role": "assistant", "metadata": "weather", "content": call},
        {"role": "observation", "content": "25 degrees"},
        {"role": "assistant", "content": "晴"},
    ]
    assert json.loads(saved.read_text(encoding="utf-8")) == {"messages": messages, "tools": tools}
    assert call in output and "A call of weather" in output
    for prompt, end in zip(prompts, (1, 3), strict=True):
        encoded = tokenizer.apply_chat_template(messages[:end], tools=tools, add_generation_prompt=True)
        assert prompt == encoded["input_ids"]


def test_oldest_turns_make_room_with_a_note(llama):
    model, tokenizer = opened(llama)  # 128 positions
    bot = chatbot.Chatbot(model, tokenizer, {"max_new_tokens": 20})
    turns = [{"role": role, "content": f"the lamps {i} " * 2} for i in range(4) for role in ("user", "assistant")] + [
        {"role": "user", "content": "last"}
    ]
    system = {"role": "system", "content": "s"}
    ids, dropped = bot.prompt([system, *turns])
    assert dropped > 0 and len(ids) + 20 <= 128
    kept = [system, *turns[2 * dropped :]]
    assert ids == tokenizer.apply_chat_template(kept, add_generation_prompt=True)["input_ids"]
    longer = tokenizer.apply_chat_template([system, *turns[2 * dropped - 2 :]], add_generation_prompt=True)[
        "input_ids"
    ]
    assert len(longer) + 20 > 128


def test_dropped_turns_are_told_and_too_long_questions_keep_the_conversation(llama, run_chat, tmp_path):
    long, saved = "the lamps " * 60, tmp_path / "rows.jsonl"
    typed = "a\n" + "the lamps \n" * 6 + f"{long}\n/save {saved}\n"
    output = run_chat(llama, "--max_new_tokens", 10, "--no_do_sample", typed=typed)
    assert "turns are left out: the prompt was too long" in output.err
    assert (
        "The model has 128 positions, of which 10 are kept for the answer (--max_new_tokens): shorten it" in output.out
    )
    assert [m["content"] for m in json.loads(saved.read_text())["messages"]][-2] == "the lamps "


def test_sampling_flags_sample_and_the_seed_repeats(llama, run_chat):
    flags = ["--prompt", "the", "--temperature", "5", "--max_new_tokens", "20"]
    first, again, other = (run_chat(llama, *flags, "--seed", seed).out for seed in (1, 1, 2))
    greedy = run_chat(llama, "--prompt", "the", "--max_new_tokens", "20").out
    assert first == again and len({first, other, greedy}) == 3


@pytest.mark.parametrize(
    "model, flags, sentence",
    [
        ("chatglm3", ["--tools", "missing.json"], "No such file or directory: 'missing.json'"),
        ("chatglm3", ["--tools", "broken.json"], "--tools broken.json is not JSON"),
        ("chatglm3", ["--tools", "object.json"], "must hold a list of objects"),
        ("chatglm2", ["--tools", "tools.json"], "was not made to call tools"),
        ("llama", ["--tools", "tools.json"], "was not made to call tools"),
        ("chatglm3", ["--no_do_sample", "--top_p", "0.5"], "--no_do_sample takes the likeliest token"),
        ("chatglm3", ["--tools", "gbk.json"], "--tools gbk.json is not JSON"),
        ("chatglm3", ["--tools", "nameless.json"], "each with its name"),
        ("chatglm3", ["--prompt", " "], "--prompt: there is no question"),
        ("chatglm3", ["--prompt", "a\udcff"], "The conversation holds what is no text"),  # a byte of another encoding
        ("chatglm3", ["--base_model", "x"], "is no adapter .* --base_model is for adapters"),
        ("chatglm3", ["--load_in_4bit"], "--load_in_4bit needs bitsandbytes: pip install bitsandbytes"),
        ("chatglm3", ["--web"], "--web needs gradio: pip install 'gradio>=6.10'"),
    ],
)
def test_mistakes_get_a_sentence(model, flags, sentence, run_chat, request, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    find_spec = opened.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    monkeypatch.chdir(tmp_path)
    for name, text in {"broken": "[", "object": "{}", "tools": '[{"name": "f"}]'}.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "gbk.json").write_bytes('["天气"]'.encode("gbk"))
    (tmp_path / "nameless.json").write_text('[{"type": "function", "function": {}}]')
    with pytest.raises(SystemExit, match=sentence):
        run_chat(request.getfixturevalue(model), *flags)


@pytest.mark.parametrize(
    "program, flags, sentence",
    [
        (chat, ["--max_new_tokens", "0"], "--max_new_tokens: must be at least 1, not 0"),
        (chat, ["--temperature", "nan"], "--temperature: must be above 0, not nan"),
        (chat, ["--top_p", "2"], "--top_p: must be above 0 and at most 1, not 2"),
        (chat, ["--top_k", "1.5"], "--top_k: invalid int value: '1.5'"),
        (chat, ["--seed", "-1"], "--seed: must be at least 0 and less than 2**32, not -1"),
        (serve, ["--port", "99999"], "--port: must be from 1 to 65535, not 99999"),
        (serve, ["--max_prompt_tokens", "0"], "--max_prompt_tokens: must be at least 1, not 0"),
        (serve, ["--api_key", ""], "--api_key is empty"),
    ],
)
def test_flags_are_told_before_anything_is_loaded(program, flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program.__name__, "nowhere", *flags])
    with pytest.raises(SystemExit) as end:
        program.parsed_arguments()
    assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="--device toaster: Expected one of cpu"):
        loading.chosen_device(argparse.Namespace(device="toaster"))


def test_damaged_weights_of_a_model_are_named(chatglm3, run_chat, tmp_path):
    shutil.copytree(chatglm3, tmp_path / "cut")
    os.truncate(tmp_path / "cut/model.safetensors", 5000)
    with pytest.raises(SystemExit, match="chat.py: The weights of .*cut cannot be loaded: Error while deserializing"):
        run_chat(tmp_path / "cut")


def test_missing_and_mismatched_models_get_a_sentence(chatglm3, llama, run_chat, tmp_path):
    with pytest.raises(SystemExit, match="nowhere is neither a folder with a config.json nor found on the hub"):
        run_chat("nowhere")
    adapter = write_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    wider = AutoModelForCausalLM.from_pretrained(llama).config
    wider.hidden_size = 64
    AutoModelForCausalLM.from_config(wider).save_pretrained(tmp_path / "wider")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "wider")
    with pytest.raises(SystemExit, match="was trained on .*llama.* the model here, .*wider.* is another one"):
        run_chat(adapter, "--base_model", tmp_path / "wider")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "wider")
    (tmp_path / "wider/chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="has no chat template, so it knows no conversations"):
        run_chat(tmp_path / "wider")


def test_devices_choose_their_dtype(monkeypatch):
    arguments = argparse.Namespace(device=None, dtype=None)
    assert loading.chosen_dtype(arguments, "cpu") is None
    for modern, dtype in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, modern=modern: modern)
        assert loading.chosen_dtype(arguments, "cuda") == dtype
    arguments.dtype = "float32"
    assert loading.chosen_dtype(arguments, "cuda") == "float32"
