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
    r"(?:\w+=\S+ )*(?:python|bash|torchrun) (?:--\w+ \d+ )?(run_chatglm_lora\.py|scripts/[\w/]+\.(?:py|sh))(.*)"
)
ELSEWHERE = re.compile(r"\.\.\.|[*<]")  # what is left out, and patterns

# Files of the reader's own that the commands name; a recipe names its own.
READERS = """arguments.yaml chats.jsonl held_out.jsonl questions.jsonl huanhuan.json tools.json train.json dev.json
answer.txt both.png advertisegen_dev.jsonl run_clm.py run_clm_lora.py OLD/run_clm.py"""


def page(path):
    return path.read_text(encoding="utf-8")


def prose(path):
    return FENCED.sub("", page(path))


def commands(path):
    """The command lines of a document that start something of ours: name of the program and words after it."""
    blocks = [body for kind, body in FENCED.findall(page(path)) if kind in ("", "bash")]
    lines = re.sub(r" *\\\n *", " ", "".join(blocks)).splitlines() + re.findall(r"^    (\w.*)", prose(path), re.M)
    named = re.findall(r"`([^`\n]+)`", prose(path))
    for line in [*lines, *named]:
        if found := LAUNCHED.fullmatch(re.split(r"[;|>] | # ", line)[0].strip()):
            name, words = found.groups()
            whole = not ELSEWHERE.search(words) and (line in lines or "--" in words)
            yield name, shlex.split(words.replace("$CLM", "run_clm.py")) if whole else []


COMMANDS = sorted({(path.name, name, tuple(words)) for path in ENGLISH for name, words in commands(path)})


class Parsed(Exception):
    """The words were taken."""


def as_id(value):
    return value if isinstance(value, str) else " ".join(value)[:60]


@pytest.mark.parametrize("document, name, words", COMMANDS, ids=as_id)
def test_command_in_a_document_is_taken(document, name, words, monkeypatch):
    assert (ROOT / name).exists()
    readers = READERS.split() + (
        re.findall(r"`(\w+\.\w+)`", prose(ROOT / "docs" / document)) if document == "recipes.md" else []
    )
    for word in words:
        if re.fullmatch(r"[\w/]+\.(jsonl?|yaml|txt|png|py)", word):
            assert word in readers or (ROOT / word).exists()
    if name.endswith(".sh"):
        further = list(words[next((n for n, word in enumerate(words) if word.startswith("--")), len(words)) :])
        if "launch.sh" in page(ROOT / name):
            flag_names.check_words(further, ROOT / "run_chatglm_lora.py")
        else:
            assert all(word in page(ROOT / name) for word in further if word.startswith("--"))
    elif name == "run_chatglm_lora.py" and words and words != ("arguments.yaml",):
        flag_names.check_words(list(words), ROOT / name)
        folder = [] if "--output_dir" in words else ["--output_dir", "out"]
        monkeypatch.setattr(sys, "argv", [name, *words, *folder, "--use_cpu", "--report_to", "none"])
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
    assert len(COMMANDS) > 30 and {"README.md", "recipes.md", "after_training.md"} < {
        document for document, *_ in COMMANDS
    }


def shape(path):
    """Of a document: fenced blocks without comments and pictures, inline code, levels of headings, rows of tables."""
    blocks = [re.sub(r"[ \t]+(#|//) .*", "", body) for kind, body in FENCED.findall(page(path)) if kind != "mermaid"]
    spans = {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(path))}
    return blocks, spans, re.findall(r"^#+(?= )", prose(path), re.M), len(re.findall(r"^\|", prose(path), re.M))


@pytest.mark.parametrize("english, chinese", PAIRS.items(), ids=lambda path: path.name)
def test_chinese_document_has_the_code_headings_and_table_rows_of_the_english_one(english, chinese):
    for ours, theirs in zip(shape(chinese), shape(english), strict=True):
        assert ours == theirs


@pytest.mark.parametrize("document", [*PAIRS, *PAIRS.values()], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_document_lead_to_files_and_headings(document):
    for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", prose(document)):
        if "://" not in target:
            path = document.parent / target if target else document
            assert path.exists(), target
            assert not heading or heading in anchors(path), heading


def anchors(path):
    """The names that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_flags_of_other_programs_lead_to_those_that_the_program_names():
    sources = (ROOT / "run_chatglm_lora.py", training_args.__file__)
    known = {name for source in sources for name in flag_names.declared_flags(source)}
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|$", page(ROOT / "docs/migrating.md"), re.M)
    assert len(rows) > 60
    for there, here in rows:
        flags, names = re.findall(r"--(\w+)", here), re.findall(r"`(?:--)?(\w+)", there)
        assert set(flags) <= known | {"web"}
        assert here.split(";")[0] != "the same" or known.issuperset(names), there
        for answer in (flag_names.OTHER_NAMES[name] for name in names if name in flag_names.OTHER_NAMES):
            assert all(f"--{flag}" in answer for flag in flags), (there, here, answer)


RECIPES = re.split(r"^(?=## )", page(ROOT / "docs/recipes.md"), flags=re.M)[2:]
SHORT = ["--max_steps", "2", "--warmup_steps", "0", "--logging_steps", "1", "--use_cpu", "--report_to", "none"]


def write_rows(recipe, folder):
    """The files that a recipe names, each with the rows that it shows, several times."""
    before, body = re.search(r"(.*?)^```(?:json|text)\n(.*?)^```$", recipe, re.M | re.S).groups()
    for name in re.findall(r"`(\w+\.(?:jsonl|txt))`", before):
        (folder / name).write_text(body * (40 if name.endswith("txt") else 4), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda text: text.splitlines()[0].lstrip("# "))
def test_recipe_runs_on_a_tiny_model(recipe, chatglm3, tmp_path, monkeypatch):
    write_rows(recipe, tmp_path)
    monkeypatch.chdir(tmp_path)
    block = next(body for kind, body in FENCED.findall(recipe) if kind == "bash").replace("\\\n", "")
    block = block.replace(" --dtype bfloat16 --bf16", "").replace("THUDM/chatglm3-6b", chatglm3)
    for _, name, *words in map(shlex.split, block.splitlines()):
        program, short = (run_chatglm_lora, SHORT) if name == "run_chatglm_lora.py" else (script("chat"), [])
        often = ["--eval_steps", "1"] if "--eval_steps" in words else []
        monkeypatch.setattr(sys, "argv", [name, *words, *short, *often])
        program.main()
        if "--do_train" in words:
            out = tmp_path / words[words.index("--output_dir") + 1]
            assert (out / "adapter_model.safetensors").exists() and (out / "eval_results.json").exists()
            assert len(losses(out)) == 2
