"""What README.md and docs/ tell a reader to type can be typed, and docs/zh/ tells the same."""

import argparse
import re
import shlex
import sys

import pytest
from tiny import ROOT, losses
from trained import script
from transformers import training_args

import run_chatglm_lora
from finetuning import flag_names


ENGLISH = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAIRS = {path: ROOT / "docs/zh" / path.name for path in ENGLISH[1:]} | {ROOT / "README.md": ROOT / "README_zh.md"}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LAUNCHED = re.compile(
    r"(?:\w+=\S+ )*(?:python|bash|torchrun) (?:--\w+ \d+ )?(run_chatglm_lora\.py|scripts/\w+\.(?:py|sh))(.*)"
)
ELSEWHERE = re.compile(r"\.\.\.|[*<]")  # what is left out, and patterns

# Files of the reader's own that the commands name; a recipe names its own.
READERS = set(
    "arguments.yaml chats.jsonl held_out.jsonl questions.jsonl huanhuan.json tools.json answer.txt both.png "
    "advertisegen_dev.jsonl train.json dev.json run_clm.py run_clm_lora.py OLD/run_clm.py".split()
)


def page(path):
    return path.read_text(encoding="utf-8")


def code(text):
    """The fenced blocks of a document and what its inline code holds; blocks without their comments."""
    blocks = [re.sub(r"[ \t]+(#|//) .*", "", body) for kind, body in FENCED.findall(text) if kind != "mermaid"]
    return blocks, {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text))}


def commands(path):
    """The command lines of a document that start something of ours: name of the program and words after it."""
    text = re.sub(r" *\\\n *", " ", page(path))
    prose = FENCED.sub("", text)
    lines = [line for kind, body in FENCED.findall(text) if kind in ("", "bash") for line in body.splitlines()]
    lines += re.findall(r"^    (\w.*)", prose, re.M)
    named = re.findall(r"`([^`\n]+)`", prose)
    for line in [*lines, *named]:
        if found := LAUNCHED.fullmatch(re.split(r"[;|>] | # ", line)[0].strip()):
            name, words = found.groups()
            whole = not ELSEWHERE.search(words) and (line in lines or "--" in words)
            yield name, shlex.split(words.replace("$CLM", "run_clm.py")) if whole else []


COMMANDS = sorted({(path.name, name, tuple(words)) for path in ENGLISH for name, words in commands(path)})


class Parsed(Exception):
    """The words were taken."""


@pytest.mark.parametrize(
    "document, name, words", COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60]
)
def test_command_in_a_document_is_taken(document, name, words, monkeypatch):
    assert (ROOT / name).exists()
    recipe_files = re.findall(r"`(\w+\.\w+)`", page(ROOT / "docs/recipes.md")) if document == "recipes.md" else []
    for word in words:
        named = re.fullmatch(r"[\w/]+\.(jsonl?|yaml|txt|png|py)", word)
        assert not named or word in READERS or word in recipe_files or (ROOT / word).exists(), word
    if name.endswith(".sh"):
        further = [*words[next((n for n, word in enumerate(words) if word.startswith("--")), len(words)) :]]
        if "launch.sh" in page(ROOT / name):
            flag_names.check_words(further, ROOT / "run_chatglm_lora.py")
        else:
            assert all(word in page(ROOT / name) for word in further)
    elif name == "run_chatglm_lora.py" and words and words != ("arguments.yaml",):
        flag_names.check_words(list(words), ROOT / name)
        alone = [] if "--output_dir" in words else ["--output_dir", "out"]
        monkeypatch.setattr(sys, "argv", [name, *words, *alone, "--use_cpu", "--report_to", "none"])
        run_chatglm_lora.parsed_arguments()
    elif name.startswith("scripts/") and words:
        parse = argparse.ArgumentParser.parse_args

        def parsed(self, *given):
            parse(self, *given)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(Parsed):
            script(name[len("scripts/") : -3]).main()


def test_commands_are_found():
    assert len(COMMANDS) > 30 and {"README.md", "recipes.md", "after_training.md"} < {c[0] for c in COMMANDS}


@pytest.mark.parametrize("english, chinese", PAIRS.items(), ids=lambda path: path.name)
def test_chinese_document_has_the_headings_code_and_links_of_the_english_one(english, chinese):
    first, second = page(english), page(chinese)
    assert code(first)[0] == code(second)[0]
    assert code(first)[1] == code(second)[1]
    headings, heads = (re.findall(r"^#+(?= )", FENCED.sub("", text), re.M) for text in (first, second))
    assert headings == heads
    rows, lines = (len(re.findall(r"^\|", FENCED.sub("", text), re.M)) for text in (first, second))
    assert rows == lines


@pytest.mark.parametrize("document", [*PAIRS, *PAIRS.values()], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_document_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", FENCED.sub("", page(document))):
        assert "://" in target or (document.parent / target).exists(), target


def test_flags_of_other_programs_lead_to_those_that_the_program_names():
    known = {
        *flag_names.declared_flags(ROOT / "run_chatglm_lora.py"),
        *flag_names.declared_flags(training_args.__file__),
    }
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|$", page(ROOT / "docs/migrating.md"), re.M)
    assert len(rows) > 60
    for there, here in rows:
        flags, names = re.findall(r"--(\w+)", here), re.findall(r"`(?:--)?(\w+)", there)
        assert set(flags) <= known | {"no_use_lora", "web"}
        assert here.split(";")[0] != "the same" or known.issuperset(names), there
        for answer in (flag_names.OTHER_NAMES[name] for name in names if name in flag_names.OTHER_NAMES):
            assert all(f"--{flag}" in answer for flag in flags), (there, here, answer)


RECIPES = re.split(r"^(?=## )", page(ROOT / "docs/recipes.md"), flags=re.M)[2:]


def written_rows(recipe, folder):
    """Files of a recipe, each with the rows that it shows, repeated so that there is something to train and split."""
    before, _, body = re.search(r"(.*?)^```(json|text)\n(.*?)^```$", recipe, re.M | re.S).groups()
    for name in re.findall(r"`(\w+\.(?:jsonl|txt))`", before):
        (folder / name).write_text(body * (40 if name.endswith("txt") else 4), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda text: text.splitlines()[0].lstrip("# "))
def test_recipe_runs_on_a_tiny_model(recipe, chatglm3, tmp_path, monkeypatch):
    written_rows(recipe, tmp_path)
    monkeypatch.chdir(tmp_path)
    text = (
        re.sub(r" *\\\n *", " ", recipe).replace(" --dtype bfloat16 --bf16", "").replace("THUDM/chatglm3-6b", chatglm3)
    )
    line = next(line for line in text.splitlines() if line.startswith("python run_chatglm_lora.py"))
    words = [
        *shlex.split(line)[1:],
        "--max_steps",
        "2",
        "--warmup_steps",
        "0",
        "--use_cpu",
        "--report_to",
        "none",
        "--logging_steps",
        "1",
    ]
    words += ["--eval_steps", "1"] if "--eval_steps" in words else []
    monkeypatch.setattr(sys, "argv", words)
    run_chatglm_lora.main()
    out = tmp_path / words[words.index("--output_dir") + 1]
    assert (out / "adapter_model.safetensors").exists() and (out / "eval_results.json").exists()
    assert losses(out)[-1] > 0
