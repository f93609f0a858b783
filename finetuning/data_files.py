"""From flags to rows: which files a flag names, and the rows of all of them as a data set."""

import glob
import json
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import datasets

from . import file_rows


FILE_BUILDERS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "txt": "text", "parquet": "parquet"}
FILE_TYPES = (*FILE_BUILDERS, "xlsx")
LFS_POINTER = b"version https://git-lfs"  # how one begins, by its specification
ROW_FEATURES = datasets.Features({name: datasets.Value("string") for name in ("row", "place", "problem")})


def check_types(files):
    """Raise a ValueError if files of flags, {flag: value}, are of no known type, or txt stands beside others."""
    found = {}  # whether it is txt: the first flag and file
    for flag, path in [(flag, path) for flag, value in files.items() if value for path in listed_files(value)]:
        kind = file_rows.type_of(path)
        if kind not in FILE_TYPES:
            known = ", .".join(FILE_TYPES)
            raise ValueError(f"{flag} {path}: the file must end in one of .{known}; .gz, .bz2, .xz, .zst may follow.")
        found.setdefault(kind == "txt", f"{flag} {path}")
    if len(found) > 1:
        raise ValueError(f"Plain text and rows do not go together: {', '.join(found.values())}.")


def builder(files) -> str:
    """What `load_dataset` reads files of plain text with, {split: paths}; ValueError if they are not of one type."""
    paths = [path for each in files.values() for path in each]
    check_files(path for path in paths if "://" not in path)
    builders = {FILE_BUILDERS.get(file_rows.type_of(path), "xlsx"): path for path in paths}
    if len(builders) > 1:
        raise ValueError(f"As plain text, all files must be of one type: {', '.join(builders.values())}.")
    if "xlsx" in builders:
        raise ValueError(f"{paths[0]}: a workbook can hold conversations, not plain text: save it as csv.")
    return next(iter(builders))


def builder_options(builder, files, keep_linebreaks) -> dict:
    """What the builder is told of the files; ValueError for csv files whose cells are parted in different ways."""
    if builder == "text":
        return {"keep_linebreaks": keep_linebreaks}
    if builder != "csv":
        return {}
    paths = [path for each in files.values() for path in each]
    columns = max(len(json.loads(next(file_rows.read_rows([path]))["row"])) for path in paths)
    cells_as_text = {"converters": dict.fromkeys(range(columns), str), "keep_default_na": False}  # 007 and NA, too
    separators = {file_rows.separator_of(path) for path in paths}
    if len(separators) > 1:
        raise ValueError(f"The cells of {', '.join(paths)} are parted by different characters: {sorted(separators)}.")
    return {**cells_as_text, "sep": separators.pop()}


def listed_files(value) -> list[str]:
    """The files that a flag names: one or several with commas, patterns with * or ?, all files of a folder."""
    files = []
    names = [value] if value and Path(value).exists() else [name.strip() for name in value.split(",")]
    for name in filter(None, names):  # Path("") is the working folder
        name = str(Path(name).expanduser()) if name.startswith("~") else name
        if Path(name).is_dir():
            files += sorted(str(path) for path in Path(name).iterdir() if path.is_file() and path.name[0] != ".")
        elif glob.has_magic(name) and not Path(name).exists():
            files += sorted(glob.glob(name))
        else:
            files.append(name)
    if not files:
        raise ValueError(f"{value or 'An empty name'} holds or matches no file.")
    return files


def files_in(folder, config_name=None) -> dict[str, list[str]]:
    """The files of each split that `datasets` finds in a folder; none where it finds something else than files."""
    with explained(folder, {}):
        found = datasets.load_dataset_builder(folder, config_name).config.data_files or {}
    return {str(split): [str(path) for path in paths] for split, paths in found.items()}


@contextmanager
def explained(dataset_name, files):
    """In the block, what `datasets` does not find or cannot read is a ValueError, with file and line where known."""
    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        paths = list(chain.from_iterable(files.values()))
        for path in filter(lambda path: Path(path).is_file(), paths):
            file_rows.check_readable(path)
        what = f"--dataset_name {dataset_name}" if dataset_name else ", ".join(paths)
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{what} cannot be loaded: {reason}") from error


def read_here(paths) -> bool:
    """Whether all files are read by `read_rows`: row by row, since Arrow unifies nested columns and knows no lines."""
    return all(file_rows.type_of(path) in file_rows.READERS and "://" not in path for path in paths)


def check_files(paths):
    """Raise a FileNotFoundError or ValueError for the first that is not there or empty."""
    for path in paths:
        if not Path(path).is_file():
            other = " but a folder, or a pipe, which cannot be read twice" if Path(path).exists() else ""
            raise FileNotFoundError(f"There is no file {path}{other}.")
        if not Path(path).stat().st_size:
            raise ValueError(f"{path} has no rows: it is empty.")
        check_downloaded([path])


def check_downloaded(paths):
    """Raise a ValueError for the first file that is a pointer of git-lfs: its place is there, its content is not."""
    for path in paths:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(
                    f"{path} is a pointer of git-lfs and not the file: run `git lfs pull` in its folder, or download "
                    "it again."
                )


def dataset_of_rows(paths, streaming, cache_dir):
    """A data set with the columns row (as JSON), place (file and line) and problem (why it cannot be read)."""
    check_files(paths)
    if streaming:
        return datasets.IterableDataset.from_generator(file_rows.read_rows, ROW_FEATURES, gen_kwargs={"paths": paths})
    # What the cache knows a file by: another size or time of change makes it another file.
    states = [(Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]
    arguments = {"paths": paths, "states": states}
    try:
        return datasets.Dataset.from_generator(
            file_rows.read_rows, ROW_FEATURES, cache_dir=cache_dir, gen_kwargs=arguments
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ from None  # the sentence that was raised in read_rows
