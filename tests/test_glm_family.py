"""GLM after ChatGLM: glm-4-9b-chat-hf, GLM-4-0414, GLM-4.5, GLM-4.7-Flash: tiny ones with templates of their shape."""

import copy
import json
import sys
from itertools import groupby

import chat
import pytest
from tiny import losses, results, write_jsonl
from tiny_models import write_tiny
from transformers import AutoTokenizer

import run_chatglm_lora


TOKENS = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
SYSTEM = (
    "[gMASK]<sop>{% if tools %}<|system|>\n# Tools\n{% for t in tools %}{{ t | tojson(ensure_ascii=False) }}\n"
    "{% endfor %}{% endif %}"
)
PLAIN = SYSTEM + (
    "{% for m in messages %}{% if m.role == 'tool' %}<|observation|>\n{% else %}<|{{ m.role }}|>{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}\n{{ c.function.arguments | tojson }}"
    "{% endfor %}{% elif m.role == 'tool' %}{{ m.content }}{% else %}"
    "{{ '\n' + m.content.split('</think>')[-1].strip() }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = SYSTEM + (
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
    "{% set thought = m.reasoning_content or '' %}{% set said = m.content or '' %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1] %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}"
    "<think>{{ thought.strip() if loop.index0 > last.user }}</think>"
    "{% if said.strip() %}{{ '\n' + said.strip() }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '\n' }}<tool_call>{{ c.function.name }}\n"
    "{% for name, value in c.function.arguments.items() %}<arg_key>{{ name }}</arg_key>\n"
    "<arg_value>{{ value }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
    "{% elif m.role == 'tool' %}<|observation|>\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {"glm": PLAIN, "glm4": PLAIN, "glm4_moe": THINKING, "glm4_moe_lite": THINKING}
TALK = [
    {"role": "user", "content": "who paints"},
    {"role": "assistant", "content": "<think>a riddle</think>the baker"},
    {"role": "user", "content": "and who counts"},
    {"role": "assistant", "content": "<think>not the baker</think>the clerk"},
]
TOOL = {"name": "lamps", "description": "Counts lamps.", "parameters": {"type": "object", "properties": {}}}
CALL = [
    {"role": "user", "content": "how many lamps"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "lamps", "arguments": {"of": "blue"}}}]},
    {"role": "tool", "content": "seven"},
    {"role": "assistant", "content": "seven lamps"},
]


@pytest.fixture(scope="module")
def glm_tokenizer(tokenizer):
    """Tokenizers by model type; like those of the releases they write no end after an answer."""

    def with_template(model_type):
        own = copy.deepcopy(tokenizer)
        own.add_special_tokens({"extra_special_tokens": TOKENS, "eos_token": "<|endoftext|>"})
        own.add_tokens(["<think>", "</think>"])
        own.chat_template, own.model_max_length = TEMPLATES[model_type], 1024
        return own

    return with_template


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_jsonl(
        tmp_path_factory.mktemp("rows") / "talks.jsonl",
        [
            {"messages": TALK},
            {"messages": TALK[:2]},
            {"messages": CALL, "tools": [{"type": "function", "function": TOOL}]},
        ],
    )


def trained_text(tokenizer, labels) -> str:
    """What is trained in an example; what is not stands as one blank."""
    parts = [list(part) for trained, part in groupby(labels, lambda label: label != -100) if trained]
    return " ".join(map(tokenizer.decode, parts))


@pytest.mark.parametrize("model_type", TEMPLATES)
def test_glm_trains_evaluates_answers_merges_and_chats(
    run, merge, rows, glm_tokenizer, model_type, tmp_path, monkeypatch, capsys
):
    tokenizer = glm_tokenizer(model_type)
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    base = write_tiny(tmp_path / "base", model_type, tokenizer, eos_token_id=stops, max_position_embeddings=1024)
    flags = [
        "--model_name_or_path",
        base,
        "--max_target_length",
        8,
        "--no_plot_loss",
        "--per_device_train_batch_size",
        4,
    ]
    stages = [
        "--do_train",
        "--train_file",
        rows,
        "--do_eval",
        "--validation_file",
        rows,
        "--do_predict",
        "--test_file",
    ]
    folder = run(flags, stages, rows, "--max_steps", 4, "--learning_rate", 3e-2)
    assert losses(folder)[-1] < losses(folder)[0]
    assert results(folder, "eval")["eval_loss"] < losses(folder)[0]
    answers = [json.loads(line) for line in (folder / "generated_predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 3

    def said(model):
        flags = ["--prompt", "who paints", "--max_new_tokens", "4", "--no_do_sample", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["chat.py", str(model), *flags])
        chat.main()
        return capsys.readouterr().out

    merged, _ = merge(folder)
    assert said(folder) == said(merged)
    assert AutoTokenizer.from_pretrained(merged).chat_template == TEMPLATES[model_type]


CALLED = (
    "\n<think></think>\n<tool_call>lamps\n<arg_key>of</arg_key>\n<arg_value>blue</arg_value>\n</tool_call>"
    "<|observation|> \n<think></think>\nseven lamps<|endoftext|>"
)
TRAINED = {
    "glm4": [
        "\nthe baker<|user|> \nthe clerk<|endoftext|>",
        "\nthe baker<|endoftext|>",
        'lamps\n{"of": "blue"}<|observation|> \nseven lamps<|endoftext|>',
    ],
    "glm4_moe": [
        "\n<think>a riddle</think>\nthe baker<|endoftext|>",
        "\n<think>not the baker</think>\nthe clerk<|endoftext|>",
        "\n<think>a riddle</think>\nthe baker<|endoftext|>",
        CALLED,
    ],
}


@pytest.mark.parametrize("model_type", TRAINED)
def test_thoughts_and_calls_are_trained_as_the_template_writes_them(
    run, rows, glm_tokenizer, model_type, tmp_path, monkeypatch
):
    """GLM-4.5 shows the thoughts behind the last question only: each answer is trained behind its own prompt."""
    trained, tokenizer = [], glm_tokenizer(model_type)
    monkeypatch.setattr(run_chatglm_lora, "publish", lambda trainer, *args: trained.extend(trainer.train_dataset))
    base = write_tiny(tmp_path / "base", model_type, tokenizer, max_position_embeddings=1024)
    run("--model_name_or_path", base, "--train_file", rows, "--do_train", "--max_steps", 1)
    assert [trained_text(tokenizer, row["labels"]) for row in trained] == TRAINED[model_type]
