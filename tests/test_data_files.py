"""Which files a flag names, and which go together."""

import json

import pytest
from tiny import write_jsonl

from finetuning.data_files import builder, builder_options, check_types, listed_files
from finetuning.file_rows import read_rows


def test_one_flag_names_several_files_a_pattern_or_a_folder(tmp_path):
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", [{"n": name}]) for name in "ab")
    for value in (f"{one},{two}", str(tmp_path / "*.jsonl"), str(tmp_path)):
        assert listed_files(value) == [one, two]
    assert [json.loads(row["row"]) for row in read_rows([one, two])] == [{"n": "a"}, {"n": "b"}]
    assert listed_files(f"{one}, {two},") == [one, two]  # a last comma is not the working folder
    with pytest.raises(ValueError, match="An empty name holds or matches no file"):
        listed_files("")
    with pytest.raises(ValueError, match=r"\*.csv holds or matches no file"):
        listed_files(str(tmp_path / "*.csv"))


def test_types_may_differ_but_for_plain_text(tmp_path):
    names = {name: str(tmp_path / name) for name in ("a.jsonl.gz", "b.csv", "c.txt", "d.docx")}
    for path in names.values():
        open(path, "w").close()
    check_types({"--train_file": names["a.jsonl.gz"], "--validation_file": names["b.csv"]})
    with pytest.raises(ValueError, match="Plain text and rows do not go together: --train_file .*a.jsonl.gz"):
        check_types({"--train_file": names["a.jsonl.gz"], "--validation_file": names["c.txt"]})
    with pytest.raises(ValueError, match="d.docx: the file must end in one of .csv, .tsv"):
        check_types({"--train_file": names["d.docx"]})


def test_plain_text_of_csv_files_is_read_with_their_separator(tmp_path):
    (tmp_path / "a.csv").write_text("text;label\na;1\nb;2\n")
    files = {"train": [str(tmp_path / "a.csv")]}
    options = {"converters": {0: str, 1: str}, "keep_default_na": False, "sep": ";"}
    assert builder(files) == "csv" and builder_options("csv", files, keep_linebreaks=True) == options


def test_plain_text_that_is_not_there_or_empty_is_named(tmp_path):
    (tmp_path / "a.txt").touch()
    for name, sentence in {"a.txt": "a.txt has no rows: it is empty", "b.txt": "There is no file .*b.txt"}.items():
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            builder({"train": [str(tmp_path / name)]})
