"""Rows as the model sees them, in the terminal and as a page, before anything is loaded."""

import re
from html import unescape
from html.parser import HTMLParser
from io import StringIO

import pytest
from tiny import CHAT_FLAGS, write_jsonl

from finetuning import preview


ROW = {"prompt": "who <b>paints</b>", "response": "the baker & co"}


@pytest.fixture
def flags(llama, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [ROW, {"prompt": "你好", "response": "好"}])
    return [
        "--model_name_or_path",
        llama,
        "--train_file",
        file,
        CHAT_FLAGS[:4],
        "--max_target_length",
        16,
        "--do_train",
    ]


class Tokens(HTMLParser):
    """The tokens of a page as (class, title, text)."""

    def __init__(self, page):
        super().__init__()
        self.found, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if self.inside or tag not in ("i",) or "title" not in attributes:
            return
        self.inside = True
        self.found.append([attributes["class"], attributes["title"], ""])

    def handle_data(self, data):
        if self.inside:
            self.found[-1][2] += data

    def handle_endtag(self, tag):
        self.inside = False


def test_rows_are_printed_as_the_model_sees_them_and_the_run_stops_without_a_trace(run, flags, capsys):
    folder = run(flags, "--preview", 1)
    shown = capsys.readouterr().out
    assert "--- train example 1: " in shown and "example 2" not in shown
    assert (
        "<|im_start|>user\nwho <b>paints</b><|im_end|>\n<|im_start|>assistant\n【the baker & co<|im_end|>\n】" in shown
    )
    assert "\x1b" not in shown and not folder.exists()


def test_trained_part_is_coloured_in_a_terminal_only(tokenizer, monkeypatch):
    class Terminal(StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert preview.coloured(Terminal()) and not preview.coloured(StringIO())
    ids = tokenizer("the baker")["input_ids"]
    labels = [-100, *ids[1:]]
    first, rest = tokenizer.decode(ids[:1]), tokenizer.decode(ids[1:])
    example = {"input_ids": ids, "labels": labels}
    assert preview.text(tokenizer, example, colours=True) == f"{first}\x1b[30;42m{rest}\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert not preview.coloured(Terminal())


def test_text_gives_no_orders_to_a_terminal():
    assert preview.printable("a\x1b[2Jb\nc\t你\x7f") == "a\\x1b[2Jb\nc\t你\\x7f"


def test_page_shows_each_token_with_its_id_and_what_is_trained(run, flags, tmp_path, tokenizer, capsys):
    page = tmp_path / "rows.html"
    folder = run(flags, "--preview_html", page)
    written = page.read_text(encoding="utf-8")
    assert not folder.exists() and f"Wrote {page}: the first 2 train examples." in capsys.readouterr().out
    assert not re.search(r"(src|href)=|https?://", written) and "<b>" not in written
    tokens = Tokens(written).found
    first = [token for token in tokens if re.match(r"0: ", token[1])]
    assert len(first) == 2 and first[0][1:] == [
        f"0: {tokenizer.convert_tokens_to_ids('<|im_start|>')} <|im_start|>"
    ] + ["<|im_start|>"]
    text = "".join(shown for _, _, shown in tokens).replace("⏎\n", "\n")
    assert "who <b>paints</b><|im_end|>" in unescape(text) and "你好" in text.replace("·", "")
    trained = "".join(shown for kind, _, shown in tokens if "t" in kind.split()).replace("·", "")
    assert trained == "the baker & co<|im_end|>⏎\n好<|im_end|>⏎\n"
    assert all("s" in kind.split() for kind, _, shown in tokens if shown.startswith("<|im"))


def test_token_that_is_a_part_of_a_character_adds_nothing_and_the_last_one_all_of_it(tokenizer):
    ids = tokenizer("a你b")["input_ids"]
    assert preview.token_texts(tokenizer, ids) == ["a", "", "", "你", "b"]


def test_row_of_a_stream_and_of_plain_text_can_be_seen(run, llama, text_files, flags, capsys):
    run(flags, "--streaming", "--max_steps", 1, "--preview", 1)
    assert "【the baker & co" in capsys.readouterr().out
    text = ["--train_file", text_files / "train.txt", "--block_size", 16, "--do_train"]
    run("--model_name_or_path", llama, text, "--preview", 1)
    assert re.search(r"train example 1: 16 tokens, 16 of them trained ---\n【", capsys.readouterr().out)


def test_number_of_rows_must_be_one_at_least(run, flags):
    with pytest.raises(ValueError, match="--preview must be at least 1, not 0"):
        run(flags, "--preview", 0)
