"""From files to rows: which files a flag names, and the rows of each with their place in it.

A row is {"row", "place", "problem"}: its JSON text, its file and line, and why it cannot be read (None: it can).
"""

import csv
import glob
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import datasets


FILE_BUILDERS = {"csv": "csv", "json": "json", "jsonl": "json", "txt": "text", "parquet": "parquet"}
READ_HERE = (".json", ".jsonl", ".csv")  # row by row; Arrow would unify nested columns, and knows no lines
ROW_FEATURES = datasets.Features({name: datasets.Value("string") for name in ("row", "place", "problem")})


def file_builder(files):
    """The `datasets` builder for files, given by flag, that must be of one known type; None if there is no file."""
    found = {}  # builder: the first flag and file that need it
    for flag, path in [(flag, path) for flag, value in files.items() if value for path in listed_files(value)]:
        suffix = Path(path).suffix.lstrip(".")
        if suffix not in FILE_BUILDERS:
            raise ValueError(f"{flag} {path}: the file must end in one of .{', .'.join(FILE_BUILDERS)}.")
        found.setdefault(FILE_BUILDERS[suffix], f"{flag} {path}")
    if len(found) > 1:
        raise ValueError(f"All files must be of one type: {', '.join(found.values())}.")
    return next(iter(found), None)


def listed_files(value) -> list[str]:
    """The files that a flag names: one or several with commas, patterns with * or ?, all files of a folder."""
    files = []
    for name in [value] if Path(value).exists() else value.split(","):
        if Path(name).is_dir():
            files += sorted(str(path) for path in Path(name).iterdir() if path.is_file() and path.name[0] != ".")
        elif glob.has_magic(name) and not Path(name).exists():
            files += sorted(glob.glob(name))
        else:
            files.append(name)
    if not files:
        raise ValueError(f"{value} holds or matches no file.")
    return files


def files_in(folder, config_name=None) -> dict[str, list[str]]:
    """The files of each split that `datasets` finds in a folder; none where it finds something else than files."""
    found = datasets.load_dataset_builder(folder, config_name).config.data_files or {}
    return {str(split): [str(path) for path in paths] for split, paths in found.items()}


def read_here(paths) -> bool:
    """Whether all files are read by `read_rows`."""
    return all(Path(path).suffix in READ_HERE and "://" not in path for path in paths)


def check_files(paths):
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path}.")


def dataset_of_rows(paths, streaming, cache_dir):
    """A data set with the columns row (as JSON), place (file and line) and problem (why it cannot be read)."""
    check_files(paths)
    if streaming:
        return datasets.IterableDataset.from_generator(read_rows, ROW_FEATURES, gen_kwargs={"paths": paths})
    # What the cache knows a file by: another size or time of change makes it another file.
    states = [(Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]
    arguments = {"paths": paths, "states": states}
    try:
        return datasets.Dataset.from_generator(read_rows, ROW_FEATURES, cache_dir=cache_dir, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ from None  # the sentence that was raised in read_rows


def read_rows(paths, states=None) -> Iterator[dict]:
    """The rows of csv, json and jsonl files. Raises a ValueError that names the file, and the line if there is one."""
    for path in paths:
        rows = 0
        for rows, row in enumerate((csv_rows if path.endswith(".csv") else json_rows)(path), 1):  # noqa: B007
            yield row
        if not rows:
            raise ValueError(f"{path} has no rows: it is empty.")


def json_rows(path) -> Iterator[dict]:
    """The rows of a file with a JSON object in each line, or with one JSON list of objects."""
    with open(path, "rb") as file:
        check_byte_order(path, start := file.read(4096))
        file.seek(0)
        if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            yield from listed_rows(path, decoded(path, file.read()))
            return
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                text, problem = line.decode("utf-8", "replace"), f"{place}, byte {error.start + 1}: {not_utf8(path)}"
                yield {"row": text, "place": place, "problem": problem}
                continue
            if text:
                yield {"row": text, "place": place, "problem": None}


def listed_rows(path, text) -> Iterator[dict]:
    """The elements of a JSON list, each with the line where it begins."""
    decoder, position, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0  # up to here the lines are counted
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if text[position : position + 1] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}.") from None
        yield {"row": text[position:end], "place": f"{path}, line {line}", "problem": None}
        position = end


def csv_rows(path) -> Iterator[dict]:
    """The rows of a csv file with a header; every cell is text."""
    csv.field_size_limit(2**31 - 1)
    with open(path, "rb") as file:
        check_byte_order(path, content := file.read())
    reader = csv.DictReader(StringIO(decoded(path, content), newline=""), restkey="", strict=True)
    try:
        for row in reader:
            place, problem = f"{path}, line {reader.line_num}", None
            if "" in row or None in row.values():
                problem = f"{place}: the number of cells differs from the header's, {len(reader.fieldnames)}."
            yield {"row": json.dumps(row, ensure_ascii=False), "place": place, "problem": problem}
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not csv: {error}.") from error


def decoded(path, content) -> str:
    """The text of a whole file, without its byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: {not_utf8(path)}") from None


def check_byte_order(path, start):
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(
            f"{path} is UTF-16. Save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path} > utf8-{Path(path).name}"
        )


def not_utf8(path) -> str:
    name = Path(path).name
    return f"not UTF-8. If it is a Chinese encoding: iconv -f GB18030 -t UTF-8 {name} > utf8-{name}"
