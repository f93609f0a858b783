"""The rows of every type of file, with their places; every row arrives, or an error names file and line."""

import bz2
import gzip
import json
import sys

import openpyxl
import pyarrow.parquet
import pytest

from finetuning import file_rows
from finetuning.file_rows import read_rows, zstd


def rows(path):
    return [(json.loads(row["row"]), row["place"].removeprefix(f"{path}, ")) for row in read_rows([str(path)])]


def test_json_lines_and_lists_give_the_same_rows_and_their_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"n": "\xe4\xbd\xa0"}\r\n\n {"n": 2}')
    (tmp_path / "a.json").write_text('[\n  {"n": "你"},\n\n  {"n": 2}\n]', encoding="utf-8")
    assert rows(tmp_path / "a.jsonl") == [({"n": "你"}, "line 1"), ({"n": 2}, "line 3")]
    assert rows(tmp_path / "a.json") == [({"n": "你"}, "line 2"), ({"n": 2}, "line 4")]


def test_cells_of_a_csv_file_are_text(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,response\n12,"a\nb"\n007,\n', encoding="utf-8-sig")
    assert rows(tmp_path / "a.csv") == [
        ({"prompt": "12", "response": "a\nb"}, "line 3"),
        ({"prompt": "007", "response": ""}, "line 4"),
    ]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.jsonl", b"", "a.jsonl has no rows: it is empty"),
        ("a.json", b"[\n]", "a.json has no rows"),
        ("a.json", b'[{"n": 1},\n {"n" 2}]', "a.json, line 2, column 7: not JSON"),
        ("a.json", '[{"n": "你"}]'.encode("gb18030"), "a.json, line 1: not UTF-8. .* iconv -f GB18030 -t UTF-8"),
        ("a.jsonl", '{"n": "你"}'.encode("utf-16"), "a.jsonl is UTF-16. Save it as UTF-8: iconv -f UTF-16"),
        ("a.csv", b'p,r\nx,"y', "a.csv, line .: not csv"),
        ("a.csv", b'p,r\nx,"y" z', "a.csv, line 2: not csv: .* Within a quoted cell, write a quotation mark twice."),
        ("a.jsonl", '{"n": 1}'.encode("utf-16-le"), "a.jsonl is UTF-16LE. Save it as UTF-8: iconv -f UTF-16LE"),
        ("a.jsonl", '{"n": 1}'.encode("utf-32"), "a.jsonl is UTF-32. Save it as UTF-8: iconv -f UTF-32"),
        ("a.jsonl", b"PK\x03\x04\x14", "a.jsonl is a zip archive and not what its name says"),
        ("a.json", b'[{"n": ' + b"9" * 5000 + b"}]", "a.json, line 1: JSON that Python does not read: Exceeds"),
        ("a.json", b"[{}," + b"[" * 100_000, "a.json, line 1: JSON that Python does not read: maximum recursion"),
        ("a.parquet", b"PAR1xxxx", "a.parquet is no parquet file, or a damaged one: "),
    ],
)
def test_file_that_cannot_be_read_is_named_with_the_way_out(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        list(read_rows([str(tmp_path / name)]))


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("a.jsonl", b'{\n "n": 1\n}\n{\n "n": 2\n}\n', [({"n": 1}, "line 1"), ({"n": 2}, "line 4")]),
        ("a.json", b'[{"n": 1}]\n[{"n": 2}]\n', [({"n": 1}, "line 1"), ({"n": 2}, "line 2")]),
        ("a.json", b'{"version": "1", "data": [\n{"n": 1},\n{"n": 2}]}', [({"n": 1}, "line 2"), ({"n": 2}, "line 3")]),
        ("a.jsonl", b'{"data": [{"n": 1}, {"n": 2}]}', [({"n": 1}, "line 1"), ({"n": 2}, "line 1")]),
        ("a.json", b'{\n"messages": [{"role": "user"}]\n}', [({"messages": [{"role": "user"}]}, "line 1")]),
        ("a.jsonl.gz", gzip.compress(b'{"n": 1}\n{"n": 2}', mtime=0), [({"n": 1}, "line 1"), ({"n": 2}, "line 2")]),
        ("a.jsonl", gzip.compress(b'{"n": 1}\n{"n": 2}', mtime=0), [({"n": 1}, "line 1"), ({"n": 2}, "line 2")]),
        ("a.jsonl.zst", zstd.compress(b'{"n": 1}\n{"n": 2}'), [({"n": 1}, "line 1"), ({"n": 2}, "line 2")]),
        ("a.json", zstd.compress(b'[{"n": 1},\n{"n": 2}]'), [({"n": 1}, "line 1"), ({"n": 2}, "line 2")]),
        ("a.json.bz2", bz2.compress(b'[{"n": 1}]'), [({"n": 1}, "line 1")]),
        ("a.tsv", b"p\tr\na,b\tc\n", [({"p": "a,b", "r": "c"}, "line 2")]),
        ("a.csv", b"p;r\na,b;c\n", [({"p": "a,b", "r": "c"}, "line 2")]),
        ("a.csv", b"p , r\na;b,c\n", [({"p": "a;b", "r": "c"}, "line 2")]),
        ("a.csv", b"\n,\np,r\n,\n  \nq,a\n", [({"p": "q", "r": "a"}, "line 6")]),
        ("a.jsonl", b'\xef\xbb\xbf{"n": 1}\n\xef\xbb\xbf{"n": 2}\n', [({"n": 1}, "line 1"), ({"n": 2}, "line 2")]),
        ("a.json", b'{"Messages": [{"role": "user"}]}', [({"Messages": [{"role": "user"}]}, "line 1")]),
        ("a.csv", b",p\n0,a\n", [({"": "0", "p": "a"}, "line 2")]),
        ("a.csv", b"text\na;b\nc\n", [({"text": "a;b"}, "line 2"), ({"text": "c"}, "line 3")]),
    ],
)
def test_every_row_arrives_with_its_place(tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    assert rows(tmp_path / name) == found


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.csv", b"p,r,p\nq,a,b\n", "a.csv, line 1: the column p stands there twice"),
        ("a.json", b'{"1": {"p": "q"}, "2": {"p": "r"}}', "a.json: an object of rows by id is found"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"n": 1}' * 99, mtime=0)[:-9],
            "a.jsonl.gz: the packed file ends early or is damaged",
        ),
        ("a.json", b'{\n"n": 1,\n}', "a.json, line 3, column 1: not JSON"),
        ("a.json", b'[{"n": 1}],\n[{"n": 2}]', "a.json, line 1, column 11: not JSON"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd0000", "a.jsonl.zst: the packed file ends early or is damaged"),
        ("a.jsonl.zst", zstd.compress(b'{"n": 1}' * 99)[:-4], "a.jsonl.zst: the packed file ends early or is damaged"),
        ("a.jsonl.bz2", b"BZh9" + bytes(9), "a.jsonl.bz2: the packed file ends early or is damaged"),
    ],
)
def test_rows_that_would_be_lost_are_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        list(read_rows([str(tmp_path / name)]))


def test_comma_behind_an_object_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1},\n{"n": 2},\n')
    problems = [row["problem"].removeprefix(f"{tmp_path}/") for row in read_rows([str(tmp_path / "a.jsonl")])]
    assert problems == [
        f"a.jsonl, line {n}, column 9: a comma behind the object: a line holds it alone." for n in (1, 2)
    ]


def test_workbook_gives_the_cells_of_its_only_filled_sheet_as_text(tmp_path):
    book = openpyxl.Workbook()
    for row in (["prompt", "response"], ["你好", 12], ["a\nb", None], [None, 1.5]):
        book.active.append(row)
    book.create_sheet("empty")
    book.save(tmp_path / "a.xlsx")
    assert rows(tmp_path / "a.xlsx") == [
        ({"prompt": "你好", "response": "12"}, "row 2"),
        ({"prompt": "a\nb", "response": ""}, "row 3"),
        ({"prompt": "", "response": "1.5"}, "row 4"),
    ]
    book["empty"].append(["prompt"])
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(
        ValueError, match=r"a.xlsx has several sheets \(Sheet, empty\): save each as a file of its own"
    ):
        rows(tmp_path / "a.xlsx")
    (tmp_path / "b.xlsx").write_text("prompt,response")
    with pytest.raises(ValueError, match="b.xlsx is no workbook"):
        rows(tmp_path / "b.xlsx")


def test_package_that_a_file_type_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(b"{}"))
    monkeypatch.setitem(file_rows.PACKED, ".zst", None)
    with pytest.raises(ValueError, match="a.jsonl.zst is packed with zstd, .*: pip install backports.zstd"):
        rows(tmp_path / "a.jsonl.zst")
    openpyxl.Workbook().save(tmp_path / "a.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ValueError, match="a.xlsx: workbooks need openpyxl: pip install openpyxl"):
        rows(tmp_path / "a.xlsx")


def test_bytes_of_parquet_files_are_text(tmp_path):
    for name, cell in {"a": "你好".encode(), "b": b"\xff\xd8"}.items():
        pyarrow.parquet.write_table(pyarrow.table({"p": [cell]}), tmp_path / f"{name}.parquet")
    assert rows(tmp_path / "a.parquet") == [({"p": "你好"}, "row 1")]
    with pytest.raises(ValueError, match="b.parquet, row 1: bytes are found that are no text in UTF-8"):
        rows(tmp_path / "b.parquet")
