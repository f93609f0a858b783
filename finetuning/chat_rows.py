"""From rows of any known format to conversations, which are lists of messages.

A message is {"role", "content", "loss"[, "tools"][, "tool_calls"][, "reasoning_content"][, "metadata"]}. `loss` says
whether it is trained, `tools` (in the first system message only) what the model may call, `tool_calls` what an
assistant message calls, `reasoning_content` what it thinks before it answers.
"""

import ast
import json
import logging
import re
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from jinja2.exceptions import TemplateError

from .data_files import ROW_FEATURES, check_files, dataset_of_rows, read_here
from .file_rows import read_rows, without_nulls
from .mistakes import did_you_mean


logger = logging.getLogger("run_chatglm_lora.data")

CUTS = {"source_cut": "max_source_length", "target_cut": "max_target_length"}  # the flags behind the columns
FIRST_ROWS = 100  # tell the columns of a file
SMALLEST_SHARE = 0.001  # a file that is drawn from more rarely would be seen whole after hours

# The names that columns are known by, in any case: question and answer; the first pair that a row has is meant.
# --help and docs/data.md show this table.
KNOWN_COLUMNS = {
    "instruction": (
        ("instruction", "output"), ("instruction", "response"), ("instruction", "completion"),
        ("instruction", "answer"), ("instruction", "target"), ("指令", "输出"), ("指令", "回答"),
    ),
    "prompt_response": (
        ("prompt", "response"), ("prompt", "completion"), ("prompt", "answer"), ("prompt", "output"),
        ("query", "response"), ("query", "answer"), ("question", "answer"), ("question", "response"),
        ("input", "output"), ("input", "target"), ("input", "response"), ("content", "summary"),
        ("document", "summary"), ("source", "target"), ("problem", "solution"), ("user", "assistant"),
        ("human", "assistant"), ("human", "gpt"), ("human", "bot"), ("q", "a"), ("问题", "回答"), ("问题", "答案"),
        ("提问", "回答"), ("问", "答"), ("输入", "输出"), ("用户", "助手"),
    ),
    "messages": (("messages",), ("conversations",), ("conversation",), ("对话",)),
}  # fmt: skip
ADDITIONS = ("input", "context", "输入")  # what an instruction is about
SYSTEM_COLUMNS = ("system", "system_prompt", "系统")
MESSAGE_COLUMNS = tuple(name for (name,) in KNOWN_COLUMNS["messages"])
PAIRS = tuple(pair for kind in ("prompt_response", "instruction") for pair in KNOWN_COLUMNS[kind])
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool", "observation", "function_call")},
    **{"human": "user", "gpt": "assistant"},  # ShareGPT
    **dict.fromkeys(("chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
    **{"developer": "system", "tool_call": "function_call"},
    **dict.fromkeys(("function", "tool_response", "function_response", "ipython"), "observation"),
    **{"用户": "user", "助手": "assistant", "系统": "system"},
}
CALLS = {"tool_calls", "function_call", "parameters"}  # with one of these a message may have no content
NAMES = ("metadata", "tool_call_id", "name")  # kept where they are text; a program's notes are objects or numbers
LOSS_KEYS = ("loss", "weight", "train")  # ms-swift's, OpenAI's, axolotl's
VERDICTS = ("label", "kto_tag")  # of preference data (KTO): whether an answer is a good one
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # DeepSeek's and Qwen's, OpenRouter's, gpt-oss'
TOOLS_PROMPT = (
    "Answer the following questions as best as you can. You have access to the following tools:"  # ChatGLM3's
)
SURROGATES = re.compile(r"\\u(d[89ab]..\\ud[c-f]..)|\\u(d[89a-f]..)|\\.", re.I)  # pairs, halves, other escapes


class BadRow(ValueError):
    """A row that is no conversation; the text names place and reason."""


class WrittenNumber(float):
    """A number with the text that it was written as, which is what it means where text is expected."""

    def __new__(cls, written):
        number = super().__new__(cls, written)
        number.written = written
        return number


@dataclass(frozen=True)
class RowFormat:
    """What the columns of a row mean; a column that is None or not in the row is not there."""

    kind: str  # prompt_response, instruction or messages
    prompt: str | None = None
    response: str | None = None
    history: str | None = None
    messages: str | None = None


# ---------------------------------------------------------------------------------------------------------- formats


def known_columns() -> str:
    """The known names in a line, for --help and for messages."""
    return ", ".join("/".join(names) for kind in KNOWN_COLUMNS.values() for names in kind)


def row_format(columns, chat_args, questions_only=False) -> RowFormat | None:
    """The format of rows with these columns: by --data_format and the column flags, else by known names; None is text.

    With `questions_only` (rows to answer) a question needs no answer column beside it. Raises a ValueError that
    names the nearest column if one that the format needs is missing.
    """
    kind, columns = chat_args.data_format, list(columns)
    named = (chat_args.prompt_column, chat_args.response_column)
    found = {each: first_known(KNOWN_COLUMNS[each], columns, questions_only) for each in KNOWN_COLUMNS}
    if kind == "auto":
        order = ("messages", "instruction", "prompt_response")
        kind = "prompt_response" if named[0] else next((each for each in order if found[each]), "text")
    if kind in ("text", "messages") and not questions_only:
        check_not_preferences(columns, chat_args, found["messages"])
    if kind == "text":
        check_not_messages(columns, chat_args)
        return None
    usual = found[kind] or KNOWN_COLUMNS[kind][0]
    if kind == "messages":
        format_found = RowFormat(kind, messages=usual[0])
    else:
        # A history is used if it is named, or if no column is.
        history = chat_args.history_column or (None if named[0] else "history")
        format_found = RowFormat(kind, named[0] or usual[0], named[1] or (None if named[0] else usual[1]), history)
        if format_found.response is None and not questions_only:
            raise ValueError("There must be an answer to train on: name its column with --response_column.")
    check_columns(format_found, columns, questions_only)
    return format_found


def first_known(names, columns, questions_only) -> tuple[str, ...] | None:
    """The first of the tuples of names that the columns have, as the columns write them."""
    written = {name.strip().lower(): name for name in reversed(columns)}
    for each in names:
        if all(name in written for name in (each[:1] if questions_only else each)):
            return tuple(written.get(name, name) for name in each)
    return None


def check_not_messages(columns, chat_args):
    """Raise a ValueError where each row is a single message, which would be trained as a text of its own."""
    if chat_args.data_format == "auto" and ({"role", "content"} <= set(columns) or {"from", "value"} <= set(columns)):
        raise ValueError(
            f"The rows have the columns {columns}: each is a message and not a conversation. Write a conversation a "
            'row, {"messages": [{"role": ..., "content": ...}, ...]}, or train the columns as they are with '
            "--data_format text."
        )


def check_not_preferences(columns, chat_args, messages):
    """Raise a ValueError for pairs of a chosen and a rejected answer (DPO), which nothing is to be made of unasked.

    A column called messages beside them holds the whole conversation, and is trained.
    """
    written = {name.strip().lower(): name for name in reversed(columns)}
    if chat_args.data_format != "auto" or not {"chosen", "rejected"} <= written.keys() or "messages" in written:
        return
    questions = [*(question for question, _ in PAIRS), "instruction"]
    question = next((written[name] for name in questions if name in written), None)
    chosen = written["chosen"]
    way_out = (
        f"write the chosen answer as the last message of '{messages[0]}'"
        if messages
        else (
            f"--prompt_column '{question}' --response_column '{chosen}'"
            if question
            else f"rename '{chosen}' to messages where it is a list of them, to text otherwise"
        )
    )
    raise ValueError(
        f"The rows have the columns {columns}: a chosen and a rejected answer are preference data (DPO), and here "
        f"answers are trained, not preferences. To train the chosen ones: {way_out}."
    )


def check_columns(found, columns, questions_only=False):
    """Raise a ValueError with the nearest name if a column that the format needs is not there."""
    needed = [found.messages] if found.messages else [found.prompt] + ([] if questions_only else [found.response])
    for name in needed:
        if name not in columns:
            raise ValueError(f"The data have no column '{name}' but {list(columns)}.{did_you_mean(name, columns)}")


def format_of(columns, chat_args) -> RowFormat | None:
    """The format of splits with these columns, {split: names}; the training rows decide where there are any.

    Raises a ValueError for a split whose columns do not fit it.
    """
    first = next((split for split in ("train", "validation", "test") if split in columns), next(iter(columns)))
    found = row_format(columns[first], chat_args, questions_only=first == "test")
    for split, names in columns.items() if found else ():
        try:
            check_columns(found, names, questions_only=split == "test")
        except ValueError as error:
            raise ValueError(f"The {split} data are not in the format of the {first} data, {found}: {error}") from None
        if unused := unused_columns(found, names):
            logger.warning(f"Columns of the {split} data that are not used: {', '.join(unused)}")
    return found


def check_text_columns(columns, row, chat_args, answers):
    """Raise a ValueError where text is meant by nobody: no column is called text, and the first row has none in the
    first column or, for a model that `answers`, in others too.

    run_clm.py trains the first column alone; of questions and answers that would be the questions.
    """
    may_be_text = [name for name in columns if is_like_text(row.get(name))]
    several, elsewhere = len(may_be_text) > 1 and answers, may_be_text and may_be_text[0] != columns[0]
    if chat_args.data_format == "auto" and "text" not in columns and (several or elsewhere):
        raise ValueError(
            f"The data have the columns {list(columns)}, whose names are not known. Name question and answer with "
            "--prompt_column and --response_column, or say --data_format text to train column "
            f"'{next(iter(columns))}' alone, as text. Known are {known_columns()}."
        )


def is_like_text(value) -> bool:
    """Whether a value is text or what text is made of; numbers, also in a csv file, truth values and null are none."""
    if not isinstance(value, str):
        return isinstance(value, (list, dict))
    try:
        float(value)
        return False
    except ValueError:
        return True


def texts_of(values, column) -> list[str]:
    """The values of a column that is trained as text; null is an empty text. Raises a ValueError for anything else."""
    for value in values:
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"The column '{column}' is to be trained as text, and {kind_of(value)} is found in it: call the "
                "column with the text 'text', or name question and answer with --prompt_column and --response_column."
            )
    return [value or "" for value in values]


def check_some_text(rows, column, split):
    """Raise a ValueError if no row of a split has text in the column; the first that has some ends the search."""
    if not any(str(row[column] or "").strip() for row in rows):
        raise ValueError(f"The {split} data have no text: the column '{column}' is empty in every row.")


def unused_columns(found, columns) -> list[str]:
    """The columns that a format passes over."""
    used = {found.prompt, found.response, found.history, found.messages, "tools"}
    extra = SYSTEM_COLUMNS + (ADDITIONS if found.kind == "instruction" else ())
    return [name for name in columns if name not in used and name.strip().lower() not in extra]


# ------------------------------------------------------------------------------------------------------------ files


def read(files, chat_args, streaming, cache_dir, seed=42):
    """The rows of the files of each split and their format; (None, None) where `load_dataset` is to read them: text,
    and files of other types."""
    paths = [path for paths in files.values() for path in paths]
    shares = chat_args.interleave_probabilities
    if not paths or chat_args.data_format == "text" or not read_here(paths):
        check_not_mixed(shares)
        return None, None
    columns = {split: first_columns(paths) for split, paths in files.items()}
    found = format_of(columns, chat_args)
    if found is None:
        check_not_mixed(shares)
        if workbook := next((path for path in paths if path.lower().endswith(".xlsx")), None):
            raise ValueError(
                f"{workbook} has the columns {next(iter(columns.values()))}, whose names are not known. Name question "
                "and answer with --prompt_column and --response_column; plain text is read from a csv file."
            )
        return None, None
    raw = {split: dataset_of_rows(paths, streaming, cache_dir) for split, paths in files.items()}
    if shares and "train" in files:
        raw["train"] = mixed_rows(files["train"], shares, streaming, cache_dir, seed)
    return raw, found


def check_not_mixed(shares):
    if shares:
        raise ValueError(
            "--interleave_probabilities mixes files of conversations, not plain text or a --dataset_name."
        )


def mixed_rows(paths, shares, streaming, cache_dir, seed):
    """The rows of files drawn by their shares until each was seen; those of a file that ends sooner come again."""
    try:
        probabilities = [float(share) for share in shares.split(",")]
    except ValueError:
        raise ValueError(f"--interleave_probabilities {shares}: numbers with commas are expected.") from None
    if (
        len(probabilities) != len(paths)
        or not abs(sum(probabilities) - 1) <= 1e-6
        or min(probabilities) < SMALLEST_SHARE
    ):
        raise ValueError(
            f"--interleave_probabilities {shares}: {len(paths)} numbers from {SMALLEST_SHARE} on that add up to 1 are "
            f"expected, one for each file: {', '.join(paths)}."
        )
    rows = [dataset_of_rows([path], streaming, cache_dir) for path in paths]
    return datasets.interleave_datasets(rows, probabilities, seed=seed, stopping_strategy="all_exhausted")


def first_columns(paths) -> list[str]:
    """Names of the columns in the first rows of files."""
    check_files(paths)
    return columns_of_rows(islice(read_rows(paths), FIRST_ROWS))


def columns_of_rows(rows) -> list[str]:
    """Names of the columns of rows read here. A row that cannot be read has none; it is named when it is encoded.

    Raises the first BadRow if none can be read.
    """
    found, errors = {}, []
    for cells in rows:
        try:
            found.update(dict.fromkeys(row_of(cells)))
        except BadRow as error:
            errors.append(error)
    if errors and not found:
        raise errors[0]
    return list(found)


def row_of(cells) -> dict:
    """A row as a dictionary, from the cells of `dataset_of_rows` or from the columns of an Arrow table."""
    if cells.keys() != ROW_FEATURES.keys():
        return {name: without_nulls(value) for name, value in cells.items()}
    if cells["problem"]:
        raise BadRow(cells["problem"])
    try:
        row = parsed(cells["row"], cells["place"])
    except json.JSONDecodeError as error:
        raise BadRow(f"{cells['place']}, column {error.colno}: not JSON: {error.msg}: {cells['row'][:80]}") from None
    if not isinstance(row, dict):
        raise BadRow(f"{cells['place']}: {kind_of(row)} is found, an object like {{...}} is expected.")
    return row


def parsed(text, place):
    """The value of a JSON text: floats as they are written, NaN (which pandas writes) as null, no half characters.

    Raises a BadRow for a key that stands twice in an object, of which json would take the last.
    """
    once = partial(with_keys_once, place=place)
    try:
        value = json.loads(text, parse_float=WrittenNumber, parse_constant=lambda name: None, object_pairs_hook=once)
    except (BadRow, json.JSONDecodeError):
        raise
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise json.JSONDecodeError(str(error), text, 0) from None
    if "\\ud" in text or "\\uD" in text:
        for match in SURROGATES.finditer(text):
            if match[2]:
                raise json.JSONDecodeError(f"\\u{match[2]} is half a character (of an emoji?)", text, match.start())
    return value


def with_keys_once(pairs, place) -> dict:
    """The object of pairs of keys and values."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow(f"{place}: the key '{twice}' stands twice in one object: rename or delete one.")
    return value


def place_of(cells, place) -> str:
    """The place of a row that was read here, or the one given."""
    return cells["place"] if cells.keys() == ROW_FEATURES.keys() else place


# --------------------------------------------------------------------------------------------------------- messages


def conversation(cells, found, place, system_prompt=None, questions_only=False) -> list[dict]:
    """The messages of a row, each with `loss`. Where there is no answer, prompt/response rows end with one whose
    content is None.

    `place` names the row where it was not read by `read_rows`. Raises a BadRow that begins with the place.
    """
    place, row = place_of(cells, place), row_of(cells)
    if found.kind == "messages":
        messages = given_messages(row, found, place)
    else:
        messages = asked_and_answered(row, found, place, questions_only)
    for number, message in enumerate(messages[1:], 2):
        if message.get("tools"):
            column = found.messages or found.prompt
            raise BadRow(f"{place}, column '{column}', message {number}: tools belong to the first message.")
    messages = with_system(messages, known_cell(row, SYSTEM_COLUMNS, place), place)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, message_of("system", system_prompt))
    if row.get("tools"):
        messages = with_tools(messages, row["tools"], f"{place}, column 'tools'")
    bad = next((name for name in VERDICTS if row.get(name) is False), None)
    if bad and not questions_only:
        raise BadRow(
            f"{place}: '{bad}' is false, which says that the answer is not to be learnt (KTO): go on without such "
            "rows, --skip_bad_rows, or delete the column."
        )
    if not questions_only and not any(message["role"] == "assistant" for message in messages):
        raise BadRow(f"{place}, column '{found.messages}': no message is an answer (role assistant or gpt).")
    return messages


def message_of(role, content, **more) -> dict:
    """A message; an answer is trained."""
    return {"role": role, "content": content, "loss": role == "assistant", **more}


def known_cell(row, names, place) -> str | None:
    """The text of the first column whose name, in any case, is among the known ones; None where it is empty."""
    for column in row:
        if column.strip().lower() in names and (text := text_of(row[column], f"{place}, column '{column}'")):
            return text
    return None


def with_system(messages, system, place) -> list[dict]:
    """The messages with the system message of a column."""
    if not system:
        return messages
    if messages[0]["role"] == "system" and messages[0]["content"] not in ("", system):
        raise BadRow(f"{place}: the row has a system message and another one in a column of its own.")
    first = messages[0] if messages[0]["role"] == "system" else message_of("system", "")
    return [{**first, "content": system}, *messages[messages[0]["role"] == "system" :]]


def asked_and_answered(row, found, place, questions_only) -> list[dict]:
    """The messages of a prompt/response or instruction row; prompt and response may be lists of messages (TRL's)."""
    needed = [found.prompt] if questions_only or not found.response else [found.prompt, found.response]
    for name in needed:
        if name not in row:
            raise BadRow(f"{place}: no column '{name}' but {list(row)}.{did_you_mean(name, row)}")
    asked, answered = (said_in(row, name, place) for name in (found.prompt, found.response))
    if isinstance(asked, list):  # its answers are examples to follow: the response is what is trained
        asked = [{**message, "loss": False} for message in asked]
    else:
        more = known_cell(row, ADDITIONS, place) if found.kind == "instruction" and asked is not None else None
        asked = [message_of("user", "\n".join(text for text in (asked, more) if text) if more else asked)]
    answered = answered if isinstance(answered, list) else [message_of("assistant", answered)]
    if answered[0]["role"] in ("system", "user"):
        raise BadRow(
            f"{place}, column '{found.response}': a whole conversation is found, an answer is expected: call the "
            "column messages, and name no other."
        )
    earlier = history_messages(row.get(found.history), f"{place}, column '{found.history}'")
    system = asked[: asked[0]["role"] == "system"]
    return [*system, *earlier, *asked[len(system) :], *answered]


def said_in(row, column, place):
    """The text of a cell, None for null, or the messages that it lists."""
    value = row.get(column)
    place = f"{place}, column '{column}'"
    listed = read_cell(value, place) if isinstance(value, str) and value.lstrip().startswith('[{"') else value
    if listed and is_list_of_objects(listed) and not is_list_of_parts(listed):
        return messages_of(listed, place)
    return text_of(value, place)


def text_of(value, place) -> str | None:
    """A value as text, None for null: text, numbers and true or false as they are written, lists of text parts."""
    if value is None or isinstance(value, str):
        return value
    if is_list_of_parts(value):
        for part in value:
            if part["type"] != "text":
                raise BadRow(f"{place}: a part of the type {part['type']!r} is found; only text can be trained here.")
        return "".join(text_of(part.get("text"), place) or "" for part in value)
    if isinstance(value, (bool, int, float)):
        return getattr(value, "written", None) or json.dumps(value)
    several = " One of several answers? Write a row for each, or go on without such rows: --skip_bad_rows."
    raise BadRow(f"{place}: {kind_of(value)} is found, text is expected.{several if isinstance(value, list) else ''}")


def kind_of(value) -> str:
    """A value and its type, as JSON calls it, for messages."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    kinds[WrittenNumber] = "a number"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({kinds.get(type(value), 'null')})"


def read_cell(value, place):
    """A nested cell, which may be JSON text (in csv files) or Python's; text that is neither stays text."""
    if not isinstance(value, str):
        return value
    try:
        return parsed(value, place)
    except json.JSONDecodeError:
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value


def history_messages(cell, place) -> list[dict]:
    """The messages of a history cell: pairs, objects or messages; a missing, null or empty history is none."""
    history = read_cell(cell or [], place)
    if not isinstance(history, (list, tuple)):
        raise BadRow(f"{place}: {kind_of(history)} is not JSON for a list of [question, answer] pairs.")
    for turn in history:
        if not isinstance(turn, dict) and not (isinstance(turn, (list, tuple)) and len(turn) == 2):
            raise BadRow(f"{place}: {kind_of(turn)} is not a [question, answer] pair of texts.")
    return messages_of(history, place)


def given_messages(row, found, place) -> list[dict]:
    """The messages of a row that lists them."""
    if found.messages not in row:
        raise BadRow(f"{place}: no column '{found.messages}' but {list(row)}.{did_you_mean(found.messages, row)}")
    place = f"{place}, column '{found.messages}'"
    listed = read_cell(row[found.messages], place)
    if not isinstance(listed, list) or not listed:
        raise BadRow(f"{place}: {kind_of(listed)} is found, a list of messages is expected.")
    messages = messages_of(listed, place)
    if messages[0]["role"] == "assistant" and not any(key in listed[0] for key in LOSS_KEYS):
        messages[0]["loss"] = False  # it answers nothing
    return messages


def messages_of(listed, place) -> list[dict]:
    """The messages of a list, in which an element may stand for more than one."""
    return [
        message
        for number, turn in enumerate(listed, 1)
        for message in messages_of_turn(turn, f"{place}, message {number}")
    ]


def messages_of_turn(turn, place) -> list[dict]:
    """A message, or the two of a pair: [question, answer], or an object with known names for both."""
    if isinstance(turn, (list, tuple)) and len(turn) == 2:
        return [message_of(role, text_of(text, place)) for role, text in zip(("user", "assistant"), turn, strict=True)]
    if not isinstance(turn, dict):
        raise BadRow(f"{place}: {kind_of(turn)} is found, an object with role and content is expected.")
    pair = None if "role" in turn or "from" in turn else first_known(PAIRS, list(turn), questions_only=False)
    if pair is None:
        return checked_messages(turn, place)
    system = known_cell(turn, SYSTEM_COLUMNS, place)
    question, answer = (text_of(turn[name], place) for name in pair)
    marked = {"loss": is_trained(turn, "assistant", place)}
    messages = [message_of("user", question), {**message_of("assistant", answer), **marked}]
    return [message_of("system", system), *messages] if system else messages


def is_trained(message, role, place) -> bool:
    """Whether a message is learnt: answers are, unless its loss, weight or train (true, false, 1 or 0) says otherwise.

    The one place where this is decided: everything behind obeys the message's `loss`.
    """
    said = {key: message[key] for key in LOSS_KEYS if message.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise BadRow(f"{place}: {key} must be true, false, 1 or 0, not {kind_of(value)}.")
    if len(set(map(bool, said.values()))) > 1:
        raise BadRow(f"{place}: {' and '.join(said)} contradict each other.")
    return bool(next(iter(said.values()), role == "assistant"))


def checked_messages(message, place) -> list[dict]:
    """The message that an object holds, or the two of ChatGLM3's tool turn: a call and an observation."""
    message = {str(key).strip().lower(): value for key, value in message.items()}
    given = "from" if "from" in message else "role"
    text = next((key for key in ("content", "value", "text") if key in message), None)
    if given not in message or not (text or CALLS & message.keys()):
        raise BadRow(f"{place}: role and content (or from and value) are expected, not {list(message)}.")
    name = message[given]
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRow(f"{place}: the role {name!r} is not one of {', '.join(ROLES)}.{did_you_mean(name, ROLES)}")
    content = message.get(text)
    if role == "tool" and "parameters" in message:
        call = called_function(message, message["parameters"], place)
        observed = as_text(message.get("observation"), place)
        return [
            {**message_of("assistant", "", tool_calls=[call]), "loss": is_trained(message, "assistant", place)},
            message_of("observation", observed),
        ]
    if role == "function_call":
        call = read_cell(content, place)
        if not isinstance(call, dict) or "name" not in call:
            raise BadRow(f'{place}: {kind_of(content)} is found, {{"name": ..., "arguments": ...}} is expected.')
        calls, role, content = [call], "assistant", ""
    else:
        calls = read_cell(message.get("tool_calls"), place) or [
            message[k] for k in ("function_call",) if message.get(k)
        ]
        if not is_list_of_objects(calls):
            raise BadRow(f"{place}: {kind_of(calls)} is found, tool_calls must be a list of objects.")
    if role in ("tool", "observation"):
        role, content = "observation", as_text(content, place)
    found = {"role": role, "content": text_of(content, place), "loss": is_trained(message, role, place)}
    if calls:
        found |= {"content": found["content"] or "", "tool_calls": [call_of(call, place) for call in calls]}
    if role == "system" and message.get("tools"):
        found["tools"] = read_tools(message["tools"], place)
    if role == "assistant" and (thought := next((message[k] for k in REASONING_KEYS if message.get(k)), None)):
        found["reasoning_content"] = text_of(thought, place)
    return [found | {name: message[name] for name in NAMES if isinstance(message.get(name), str) and message[name]}]


def call_of(call, place) -> dict:
    """A call as chat templates take it; its id is kept, which some of them write."""
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise BadRow(f"{place}: {kind_of(function)} is found, a function with name and arguments is expected.")
    return {
        **({"id": call["id"]} if call.get("id") else {}),
        **called_function(function, function.get("arguments"), place),
    }


def called_function(function, arguments, place) -> dict:
    """The call of a function, whose arguments may be JSON text."""
    arguments = {} if arguments is None else read_cell(arguments, place)
    if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
        raise BadRow(f"{place}: a call needs a name (text) and its arguments or parameters (an object).")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def as_text(value, place) -> str:
    """What a tool gave back, as text: text, text parts, anything else as JSON."""
    if isinstance(value, str) or (is_list_of_parts(value) and {part["type"] for part in value} == {"text"}):
        return text_of(value, place)
    return json.dumps(value, ensure_ascii=False)


def read_tools(cell, place):
    """Tools, which may be JSON text; a single one is a list of one."""
    tools = read_cell(cell, place)
    if isinstance(tools, str):
        raise BadRow(f'{place}: {kind_of(tools)} is not JSON; a list of tools, [{{"name": ...}}, ...], is expected.')
    return [tools] if isinstance(tools, dict) and "name" in tools.get("function", tools) else tools


def with_tools(messages, cell, place) -> list[dict]:
    """The messages with the tools in the system message, which is made where there is none."""
    tools = read_tools(cell, place)
    if not tools:
        return messages
    if messages[0]["role"] != "system":
        return [message_of("system", "", tools=tools), *messages]
    if messages[0].get("tools"):
        raise BadRow(f"{place}: the tools stand both in the row and in its system message.")
    return [{**messages[0], "tools": tools}, *messages[1:]]


def as_template_takes_them(messages, tokenizer) -> tuple[list[dict], list | None]:
    """Messages in the words of a chat template, and the tools where it takes them apart from the messages.

    ChatGLM3 and GLM-4 write calls in a way of their own, and tools in the system message. Other templates that speak
    of tools get `tools`, calls as `tool_calls` and results as role "tool"; where a template knows no tools, or they
    are no list of objects, they are written into the system message as JSON. Raises a ValueError where a template has
    no place for a thought.
    """
    plain = all(len(message) == 3 for message in messages)  # role, content and loss: most conversations
    if not plain:
        messages = [with_thought_named(message, str(tokenizer.chat_template)) for message in messages]
    tools = messages[0].get("tools")
    if tools and not ("tools" in str(tokenizer.chat_template) and is_list_of_objects(tools)):
        content = (messages[0]["content"] or TOOLS_PROMPT) + "\n" + json.dumps(tools, ensure_ascii=False, indent=4)
        messages, tools = [message_of("system", content), *messages[1:]], None
    if written := getattr(tokenizer, "written_tool_calls", None):
        return (messages if plain else written(messages)), None
    if tools:
        messages = ([message_of("system", messages[0]["content"])] if messages[0]["content"] else []) + messages[1:]
    return [{**each, "role": "tool"} if each["role"] == "observation" else each for each in messages], tools


def with_thought_named(message, template) -> dict:
    """The message with its thought under the name that the template has for it."""
    if "reasoning_content" not in message:
        return message
    names = [key for key in REASONING_KEYS if re.search(rf"\.{key}\b|['\"]{key}['\"]", template)]
    if not names:
        raise ValueError(
            "The chat template has no place for reasoning_content: write the thought into the content, between the "
            "marks that the model knows, or leave it out."
        )
    message = dict(message)
    return {names[0]: message.pop("reasoning_content"), **message}


def split_where_refused(messages, tokenizer) -> list[dict]:
    """The messages, with several calls in one as a message each where the chat template takes one call at a time."""
    if all(len(message.get("tool_calls", ())) < 2 for message in messages):
        return messages
    if takes_several_calls(tokenizer, tokenizer.chat_template):
        return messages
    return [part for message in messages for part in with_one_call_each(message)]


def with_one_call_each(message) -> list[dict]:
    first, *others = message.get("tool_calls", [None])
    if not others:
        return [message]
    return [{**message, "tool_calls": [first]}, *(
        {**message_of("assistant", "", tool_calls=[call]), "loss": message["loss"]} for call in others
    )]  # fmt: skip


@lru_cache(maxsize=8)
def takes_several_calls(tokenizer, template) -> bool:
    """Whether a chat template that takes one call in a message takes two as well."""
    call = {"id": "000000000", "type": "function", "function": {"name": "f", "arguments": {}}}
    for calls in ([call, call], [call]):
        talk = [message_of("user", "1"), message_of("assistant", "", tool_calls=calls)]
        try:
            tokenizer.apply_chat_template(as_template_takes_them(talk, tokenizer)[0], tokenize=False)
            return calls == [call, call]
        except TemplateError:
            continue
    return True  # it takes none: its own sentence says so


def is_list_of_objects(value) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def is_list_of_parts(value) -> bool:
    """Whether a content is a list of parts with types, as OpenAI and transformers have it."""
    return bool(value) and is_list_of_objects(value) and all("type" in part for part in value)


# ----------------------------------------------------------------------------------- rows that give no examples


def skipped(error, chat_args) -> str:
    """What is wrong with a bad row, where bad rows are skipped; else the error is raised."""
    if chat_args.skip_bad_rows:
        return str(error)
    raise error


def rows_of(batch) -> list[dict]:
    """A batch of `datasets.map`, {column: values}, as a list of rows."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def with_trained_tokens(encoded, split, rows, chat_args, training_args):
    """The examples that have something to train on; what was dropped or cut is logged, with row numbers."""
    extra = ["source_cut", "target_cut", "left_out", "row", "problem"]
    encoded = without_bad_rows(encoded, split, rows, chat_args, training_args)
    if isinstance(encoded, datasets.IterableDataset):
        return encoded.filter(lambda example: warned_if_empty(example, split)).remove_columns(extra)
    kept = np.flatnonzero(encoded.with_format("numpy")["length"][:])
    dropped = set()
    if len(kept) < len(encoded):
        dropped = set(encoded["row"][:]) - set(encoded.select(kept)["row"][:])
        encoded = encoded.select(kept)
        named = ", ".join(str(number + 1) for number in sorted(dropped))
        logger.warning(
            f"{len(dropped)} of {len(rows)} {split} rows have no question or no answer to train on and are dropped: "
            f"{named[:500]}"
        )
    if len(encoded) == 0:
        raise ValueError(f"No {split} row has an answer to train on: see --data_format and the column flags.")
    cut = {name: int(np.sum(encoded.with_format("numpy")[name][:])) for name in CUTS}
    counts = f"{len(dropped)} rows dropped, {cut['source_cut']} prompts and {cut['target_cut']} answers cut"
    logger.info(f"Limits of {split}: {counts}")
    for name, flag in CUTS.items():
        if encoded[0][name]:
            logger.warning(f"The first {split} example is cut by --{flag} {getattr(chat_args, flag)}.")
        share = cut[name] / len(encoded)
        if share > 0.01:
            limit = f"--{flag} {getattr(chat_args, flag)}"
            logger.warning(f"{share:.1%} of the {split} examples are cut by {limit}: raise it to keep all of them.")
    numbers = encoded.with_format("numpy")
    if lacking := (np.unique(numbers["row"][:][numbers["left_out"][:]]) + 1).tolist():
        logger.warning(
            f"The chat template leaves out the content of a message in {len(lacking)} of {len(rows)} {split} rows: "
            f"{str(lacking)[1:501]}"
        )
    return encoded.remove_columns(extra)


def warned_if_empty(example, split) -> bool:
    """Whether a streamed example has something to train on; if not, its row is logged."""
    if not example["input_ids"]:
        logger.warning(f"{split} row {example['row'] + 1} has no question or no answer and is dropped.")
    for flag in (flag for name, flag in CUTS.items() if example[name] and example["row"] == 0):
        logger.warning(f"The first {split} example is cut by --{flag}.")
    if example["left_out"]:
        logger.warning(f"{split} row {example['row'] + 1}: the chat template leaves out the content of a message.")
    return bool(example["input_ids"])


def without_bad_rows(encoded, split, rows, chat_args, training_args):
    """The examples of good rows. The bad ones are counted and listed, with what is wrong, in bad_rows_SPLIT.jsonl.

    A run that only looks lists none.
    """
    path = None if chat_args.only_looks else Path(training_args.output_dir, f"bad_rows_{split}.jsonl")
    if isinstance(encoded, datasets.IterableDataset):
        return encoded.filter(partial(is_good, path=path))
    problems = encoded["problem"][:]
    bad = {encoded[index]["row"]: problem for index, problem in enumerate(problems) if problem is not None}
    if not bad:
        return encoded
    if path and training_args.should_save:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{**rows[number], "problem": problem} for number, problem in bad.items()]
        path.write_text("".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines), "utf-8")
    if len(bad) == len(encoded):
        raise ValueError(f"All {len(bad)} {split} rows are bad; the first: {next(iter(bad.values()))}")
    listed = f"they are listed in {path}" if path else f"the first: {next(iter(bad.values()))}"
    logger.warning(f"{len(bad)} of {len(rows)} {split} rows are bad and left out; {listed}")
    return encoded.select([index for index, problem in enumerate(problems) if problem is None])


def is_good(example, path) -> bool:
    """Whether a streamed example comes from a good row; a bad one is logged and listed, each time it is met."""
    if example["problem"] is None:
        return True
    logger.warning(f"{example['problem']} The row is left out; such rows are listed in {path or 'a training'}.")
    if path is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"row": example["row"] + 1, "problem": example["problem"]}, ensure_ascii=False) + "\n")
    return False
