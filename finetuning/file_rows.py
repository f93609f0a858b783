"""The rows of one file, each with its place in it, whatever the type of the file and however it is packed.

A row is {"row", "place", "problem"}: its JSON text, its file and line, and why it cannot be read (None: it can).
"""

import bz2
import csv
import gzip
import json
import logging
import lzma
import sys
import zlib
from collections.abc import Iterator
from functools import lru_cache
from io import StringIO
from itertools import islice
from pathlib import Path
from zipfile import BadZipFile

import pyarrow.parquet


try:  # optional
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ModuleNotFoundError:
    zstd = None

logger = logging.getLogger("run_chatglm_lora.data")

PACKED = {".gz": gzip, ".bz2": bz2, ".xz": lzma, ".zst": zstd}  # suffixes, and the modules that unpack
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
NOT_TEXT = {b"PK\x03\x04": "a zip archive", b"%PDF": "a PDF"}  # first bytes of what has the suffix of another type
SEPARATORS = ",;\t|"
# Lists of objects under these names belong to a row; under any other, in the only object of a file, they are the rows.
PARTS_OF_ROWS = ("messages", "conversations", "conversation", "对话", "history", "tools", "prompt", "completion")
DECODER = json.JSONDecoder()
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, *([zstd.ZstdError] if zstd else []))


def read_rows(paths, states=None) -> Iterator[dict]:
    """The rows of files. Raises a ValueError that names the file, and the line if there is one."""
    for path in paths:
        rows = 0
        try:
            for rows, row in enumerate(READERS[type_of(path)](path), 1):  # noqa: B007
                yield row
        except DAMAGED as error:
            if getattr(error, "errno", None):  # the file cannot be read at all
                raise
            raise ValueError(f"{path}: the packed file ends early or is damaged: {error}. Copy it anew.") from None
        if not rows:
            raise ValueError(f"{path} has no rows: it is empty.")


def type_of(path) -> str:
    """The suffix that tells a file's type, without the dot and without that of its packing."""
    name = Path(path)
    return (name.with_suffix("") if name.suffix.lower() in PACKED else name).suffix.lstrip(".").lower()


def opened(path):
    """A file to read bytes from, unpacked where its content is packed, whatever it is called."""
    with open(path, "rb") as file:
        start = file.read(6)
    packing = next((suffix for magic, suffix in MAGIC.items() if start.startswith(magic)), None)
    if packing is None:
        return open(path, "rb")
    if PACKED[packing] is None:
        raise ValueError(
            f"{path} is packed with zstd, for which Python before 3.14 needs a package: pip install backports.zstd, "
            f"or unpack the file, zstd -d {path}"
        )
    return PACKED[packing].open(path)


@lru_cache
def say_once(text):
    """A file is read twice: first for its columns."""
    logger.warning(text)


def cells(row, place, problem=None) -> dict:
    """A row as its readers give it."""
    return {"row": row, "place": place, "problem": problem}


# ------------------------------------------------------------------------------------------------------------- json


def json_rows(path) -> Iterator[dict]:
    """The rows of a file with an object a line, or with lists of objects, or objects over several lines."""
    with opened(path) as file:
        check_start(path, file.read(4))
        file.seek(0)
        first = next((line for line in file if line.strip(b" \t\r\n\xef\xbb\xbf")), b"").lstrip(b"\xef\xbb\xbf")
        more = any(line.strip() for line in file)
        file.seek(0)
        if more and not spans_lines(path, first, file):
            file.seek(0)
            yield from line_rows(path, file)
        else:
            file.seek(0)
            yield from value_rows(path, decoded(path, file.read()))


def spans_lines(path, first, file) -> bool:
    """Whether the first value of a file goes on behind its first line."""
    if first.lstrip()[:1] == b"[" or first.strip() == b"{":
        return True
    try:
        json.loads(first)
        return False
    except (ValueError, RecursionError):  # also where it is not UTF-8
        text = file.read().decode("utf-8-sig", "replace").lstrip()
    try:
        return "\n" in text[: DECODER.raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return False


def line_rows(path, file) -> Iterator[dict]:
    """The rows of a file with an object a line."""
    for number, line in enumerate(file, 1):
        place = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig").strip()  # files put behind one another have marks in between
        except UnicodeDecodeError as error:
            problem = f"{place}, byte {error.start + 1}: {not_utf8(path)}"
            yield cells(line.decode("utf-8", "replace"), place, problem)
            continue
        if text.endswith("},"):
            yield cells(text, place, f"{place}, column {len(text)}: a comma behind the object: a line holds it alone.")
        elif text:
            yield cells(text, place)


def value_rows(path, text) -> Iterator[dict]:
    """The rows of a text that holds JSON values one after another: lists of rows, and rows."""
    position = after_blanks(text, 0)
    only = text[position : position + 1] == "{" and not text[end_of_value(path, text, position) :].strip()
    places = Places(path, text)
    if only and (wrapped := rows_within(path, text, position)) is not None:
        position = wrapped
    while position < len(text):
        if text[position] == "[":
            position = yield from listed_rows(path, text, position + 1, places)
            if only:
                return
        else:
            end = end_of_value(path, text, position)
            yield cells(text[position:end], places.of(position))
            position = end
        position = after_blanks(text, position)


def listed_rows(path, text, position, places):
    """The elements of a JSON list, each with the line where it begins; returns where the list ends."""
    while True:
        position = after_blanks(text, position, " \t\r\n,")
        if text[position : position + 1] == "]":
            return position + 1
        end = end_of_value(path, text, position)
        yield cells(text[position:end], places.of(position))
        position = end


class Places:
    """The lines of growing positions in a text."""

    def __init__(self, path, text):
        self.path, self.text, self.line, self.counted = path, text, 1, 0

    def of(self, position) -> str:
        self.line, self.counted = self.line + self.text.count("\n", self.counted, position), position
        return f"{self.path}, line {self.line}"


def after_blanks(text, position, blanks=" \t\r\n") -> int:
    while position < len(text) and text[position] in blanks:
        position += 1
    return position


def end_of_value(path, text, position) -> int:
    """Where the JSON value ends that begins at a position."""
    try:
        return DECODER.raw_decode(text, position)[1]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, position) + 1
        raise ValueError(f"{path}, line {line}: JSON that Python does not read: {error}.") from None


def rows_within(path, text, position) -> int | None:
    """Where the list of rows begins in the only object of a file; None if the object is a row itself.

    Raises a ValueError for an object of rows by id.
    """
    whole = DECODER.raw_decode(text, position)[0]
    if len(whole) > 1 and all(isinstance(value, dict) for value in whole.values()):
        raise ValueError(f"{path}: an object of rows by id is found; write them as a list, [{{...}}, ...].")
    lists = [key for key, value in whole.items() if is_list_of_objects(value)]
    if len(lists) != 1 or lists[0].strip().lower() in PARTS_OF_ROWS:
        return None
    say_once(f"{path} is one object: its rows are taken from the list under '{lists[0]}'.")
    for key, value_at in members(text, position):
        if key == lists[0]:
            position = value_at
    return position


def members(text, position) -> Iterator[tuple[str, int]]:
    """The keys of the JSON object that begins at a position, and where their values begin."""
    position = after_blanks(text, position + 1)
    while text[position] != "}":
        key, position = DECODER.raw_decode(text, position)
        position = after_blanks(text, position, " \t\r\n:")
        yield key, position
        position = after_blanks(text, DECODER.raw_decode(text, position)[1], " \t\r\n,")


def is_list_of_objects(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


# ----------------------------------------------------------------------------------------------------------- tables


def csv_rows(path) -> Iterator[dict]:
    """The rows of a csv or tsv file with a header; every cell is text."""
    csv.field_size_limit(2**31 - 1)
    with opened(path) as file:
        check_start(path, content := file.read())
    text = decoded(path, content)
    reader = csv.reader(StringIO(text, newline=""), delimiter=separator(path, text), strict=True)
    try:
        yield from table_rows(path, ((f"line {reader.line_num}", row) for row in reader))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: not csv: {error}. Within a quoted cell, write a quotation mark twice."
        ) from error


def separator(path, text) -> str:
    """What parts the cells: a tab in .tsv files, else a comma, unless only another gives a header of several cells
    and rows like it.
    """
    if type_of(path) == "tsv":
        return "\t"
    for found in SEPARATORS:
        reader = csv.reader(StringIO(text, newline=""), delimiter=found)
        counts = [len(row) for row in islice((row for row in reader if row), 5)] or [0]
        if found == "," and counts[0] > 1:
            break
        if counts[0] > 1 and len(set(counts)) == 1:
            say_once(f"The cells of {path} are taken to be parted by {found!r}.")
            return found
    return ","


def separator_of(path) -> str:
    with opened(path) as file:
        return separator(path, file.read().decode("utf-8-sig", "replace"))


def table_rows(path, rows) -> Iterator[dict]:
    """Rows of cells, given as (place, cells), as objects; the first that is not blank holds the names."""
    names = None
    for where, row in rows:
        place = f"{path}, {where}"
        if not any(map(str.strip, row)):
            continue
        if names is None:
            names = [name.strip() for name in row]
            if twice := sorted({name for name in names if name and names.count(name) > 1}):
                raise ValueError(f"{place}: the column {', '.join(twice)} stands there twice: rename or delete one.")
            continue
        problem = None
        if len(row) != len(names):
            problem = f"{place}: the number of cells, {len(row)}, differs from the header's, {len(names)}."
        yield cells(json.dumps(dict(zip(names, row, strict=False)), ensure_ascii=False), place, problem)


def xlsx_rows(path) -> Iterator[dict]:
    """The rows of the only sheet of a workbook that has any; every cell is text."""
    import pandas  # half a second, and openpyxl is optional

    try:
        sheets = pandas.read_excel(path, sheet_name=None, header=None, dtype=str, keep_default_na=False)
    except ImportError:
        raise ValueError(f"{path}: workbooks need openpyxl: pip install openpyxl, or save it as csv.") from None
    except (ValueError, BadZipFile, KeyError) as error:
        raise ValueError(f"{path} is no workbook, or a damaged one: {error}. Save it anew, or as csv.") from None
    filled = {name: sheet for name, sheet in sheets.items() if len(sheet)}
    if len(filled) > 1:
        raise ValueError(f"{path} has several sheets ({', '.join(filled)}): save each as a file of its own.")
    for sheet in filled.values():
        yield from table_rows(path, ((f"row {number}", row) for number, row in enumerate(sheet.values.tolist(), 1)))


def parquet_rows(path) -> Iterator[dict]:
    """The rows of a parquet file."""
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                row = {name: without_nulls(value) for name, value in row.items()}
                yield cells(json.dumps(row, ensure_ascii=False, default=as_text), f"{path}, row {number}")
    except UnicodeDecodeError:
        raise ValueError(f"{path}, row {number}: bytes are found that are no text in UTF-8.") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file, or a damaged one: {error}") from None


def as_text(value) -> str:
    """A value that JSON does not know: bytes, as which some programs store text, a date, a decimal number."""
    return value.decode() if isinstance(value, bytes) else str(value)


def without_nulls(value):
    """A nested value without the keys that an Arrow table adds, with null, where other rows have them."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


READERS = {
    **{"json": json_rows, "jsonl": json_rows, "csv": csv_rows, "tsv": csv_rows},
    **{"xlsx": xlsx_rows, "parquet": parquet_rows},
}


# --------------------------------------------------------------------------------------------------------- encoding


def decoded(path, content) -> str:
    """The text of a whole file, without its byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: {not_utf8(path)}") from None


def check_start(path, start):
    """Raise a ValueError for what the first four bytes show not to be text in UTF-8."""
    found = json.detect_encoding(start[:4]).upper().replace("-LE", "LE").replace("-BE", "BE")  # iconv's names
    if not found.startswith("UTF-8"):
        name = Path(path).name
        raise ValueError(f"{path} is {found}. Save it as UTF-8: iconv -f {found} -t UTF-8 {path} > utf8-{name}")
    if start[:4] in NOT_TEXT:
        raise ValueError(f"{path} is {NOT_TEXT[start[:4]]} and not what its name says: take the text out of it first.")


def check_readable(path):
    """Raise a ValueError for the first place of a file that is no text in UTF-8, or no row."""
    if type_of(path) == "txt":
        with opened(path) as file:
            check_start(path, content := file.read())
            decoded(path, content)
        return
    for row in read_rows([path]):
        if row["problem"]:
            raise ValueError(row["problem"])
        try:
            json.loads(row["row"])
        except json.JSONDecodeError as error:
            raise ValueError(f"{row['place']}, column {error.colno}: not JSON: {error.msg}.") from None


def not_utf8(path) -> str:
    name = Path(path).name
    return f"not UTF-8. If it is a Chinese encoding: iconv -f GB18030 -t UTF-8 {name} > utf8-{name}"
