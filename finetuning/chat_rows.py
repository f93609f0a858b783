"""From rows of any known format to conversations, which are lists of messages.

A message is {"role", "content"[, "loss"][, "tools"][, "tool_calls"]}. `loss` says whether it is trained, `tools` (in
the first system message only) what the model may call, `tool_calls` what an assistant message calls.
"""

import difflib
import json
import logging
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np

from .data_files import ROW_FEATURES, check_files, dataset_of_rows, read_here, read_rows


logger = logging.getLogger("run_chatglm_lora.data")

FIRST_ROWS = 100  # tell the columns of a file

PROMPT_COLUMNS = (("prompt", "response"), ("input", "target"), ("content", "summary"))
MESSAGE_COLUMNS = ("messages", "conversations")
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool", "observation", "function_call")},
    **{"human": "user", "gpt": "assistant"},  # ShareGPT
}
TOOLS_PROMPT = (
    "Answer the following questions as best as you can. You have access to the following tools:"  # ChatGLM3's
)


class BadRow(ValueError):
    """A row that is no conversation; the text names place and reason."""


@dataclass(frozen=True)
class RowFormat:
    """What the columns of a row mean; a column that is None or not in the row is not there."""

    kind: str  # prompt_response, instruction or messages
    prompt: str | None = None
    response: str | None = None
    history: str | None = None
    messages: str | None = None


# ---------------------------------------------------------------------------------------------------------- formats


def row_format(columns, chat_args, questions_only=False) -> RowFormat | None:
    """The format of rows with these columns: by --data_format and the column flags, else by known names; None is text.

    With `questions_only` (rows to answer) a prompt column needs no response column beside it. Raises a ValueError
    that names the nearest column if one that the format needs is missing.
    """
    kind, columns = chat_args.data_format, list(columns)
    named = (chat_args.prompt_column, chat_args.response_column)
    pairs = [pair for pair in PROMPT_COLUMNS if pair[0] in columns and (questions_only or pair[1] in columns)]
    messages = [name for name in MESSAGE_COLUMNS if name in columns]
    if kind == "auto":
        if named[0]:
            kind = "prompt_response"
        elif messages:
            kind = "messages"
        elif "instruction" in columns and (questions_only or "output" in columns):
            kind = "instruction"
        else:
            kind = "prompt_response" if pairs else "text"
    if kind == "text":
        return None
    if kind == "messages":
        found = RowFormat(kind, messages=(messages or MESSAGE_COLUMNS)[0])
    else:
        usual = ("instruction", "output") if kind == "instruction" else (pairs or PROMPT_COLUMNS)[0]
        # A history is used if it is named, or if no column is.
        history = chat_args.history_column or (None if named[0] else "history")
        found = RowFormat(kind, named[0] or usual[0], named[1] or (None if named[0] else usual[1]), history)
    if found.kind != "messages" and found.response is None and not questions_only:
        raise ValueError("There must be an answer to train on: name its column with --response_column.")
    check_columns(found, columns, questions_only)
    return found


def check_columns(found, columns, questions_only=False):
    """Raise a ValueError with the nearest name if a column that the format needs is not there."""
    needed = [found.messages] if found.messages else [found.prompt] + ([] if questions_only else [found.response])
    for name in needed:
        if name not in columns:
            raise ValueError(f"The data have no column '{name}' but {list(columns)}.{nearest(name, columns)}")


def nearest(name, names) -> str:
    """A question that offers the nearest of some names, or nothing where none is near."""
    near = difflib.get_close_matches(str(name), [str(each) for each in names], n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def format_of(columns, chat_args) -> RowFormat | None:
    """The format of splits with these columns, {split: names}; the training rows decide where there are any."""
    split = next((split for split in ("train", "validation", "test") if split in columns), next(iter(columns)))
    return row_format(columns[split], chat_args, questions_only=split == "test")


# ------------------------------------------------------------------------------------------------------------ files


def read(files, chat_args, streaming, cache_dir):
    """The rows of the files of each split and their format; (None, None) where `load_dataset` is to read them: text,
    and files of other types."""
    paths = [path for paths in files.values() for path in paths]
    if not paths or chat_args.data_format == "text" or not read_here(paths):
        return None, None
    found = format_of({split: first_columns(paths) for split, paths in files.items()}, chat_args)
    if found is None:
        return None, None
    return {split: dataset_of_rows(paths, streaming, cache_dir) for split, paths in files.items()}, found


def first_columns(paths) -> list[str]:
    """Names of the columns in the first rows of files."""
    check_files(paths)
    return columns_of_rows(islice(read_rows(paths), FIRST_ROWS))


def columns_of_rows(rows) -> list[str]:
    """Names of the columns of rows read here. A row that cannot be read has none; it is named when it is encoded."""
    found = {}
    for cells in rows:
        try:
            found.update(dict.fromkeys(row_of(cells)))
        except BadRow:
            continue
    return list(found)


def row_of(cells) -> dict:
    """A row as a dictionary, from the cells of `dataset_of_rows` or from the columns of an Arrow table."""
    if cells.keys() != ROW_FEATURES.keys():
        return {name: without_nulls(value) for name, value in cells.items()}
    if cells["problem"]:
        raise BadRow(cells["problem"])
    try:
        row = json.loads(cells["row"])
    except json.JSONDecodeError as error:
        raise BadRow(f"{cells['place']}, column {error.colno}: not JSON: {error.msg}: {cells['row'][:80]}") from None
    if not isinstance(row, dict):
        raise BadRow(f"{cells['place']}: {kind_of(row)} is found, an object like {{...}} is expected.")
    return row


def place_of(cells, place) -> str:
    """The place of a row that was read here, or the one given."""
    return cells["place"] if cells.keys() == ROW_FEATURES.keys() else place


def without_nulls(value):
    """A nested value without the keys that an Arrow table adds, with null, where other rows have them."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


# --------------------------------------------------------------------------------------------------------- messages


def conversation(cells, found, place, system_prompt=None, questions_only=False) -> list[dict]:
    """The messages of a row. Where there is no answer, prompt/response rows end with one whose content is None.

    `place` names the row where it was not read by `read_rows`. Raises a BadRow that begins with the place.
    """
    place, row = place_of(cells, place), row_of(cells)
    if found.kind == "messages":
        messages = given_messages(row, found, place)
    else:
        messages = asked_and_answered(row, found, place, questions_only)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    if row.get("tools"):
        messages = with_tools(messages, json_cell(row["tools"]), place)
    if not questions_only and not any(message["role"] == "assistant" for message in messages):
        raise BadRow(f"{place}, column '{found.messages}': no message is an answer (role assistant or gpt).")
    return messages


def asked_and_answered(row, found, place, questions_only) -> list[dict]:
    """The messages of a prompt/response or instruction row."""
    needed = [found.prompt] if questions_only or not found.response else [found.prompt, found.response]
    for name in needed:
        if name not in row:
            raise BadRow(f"{place}: no column '{name}' but {list(row)}.{nearest(name, row)}")
    question, answer = (text_cell(row, name, place) for name in (found.prompt, found.response))
    if found.kind == "instruction" and question is not None:
        question = "\n".join(text for text in (question, text_cell(row, "input", place)) if text)
    messages = []
    if found.history and (system := text_cell(row, "system", place)):
        messages.append({"role": "system", "content": system})
    for asked, answered in history_pairs(row.get(found.history), f"{place}, column '{found.history}'"):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def text_cell(row, column, place) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise BadRow(f"{place}, column '{column}': {kind_of(value)} is found, text is expected.")
    return value


def kind_of(value) -> str:
    """A value and its type, as JSON calls it, for messages."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({kinds.get(type(value), 'null')})"


def json_cell(value):
    """A nested cell, which csv files hold as JSON text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def history_pairs(cell, place) -> list:
    """The [question, answer] pairs of a history cell; a missing, null or empty history is none."""
    history = json_cell(cell or [])
    if not isinstance(history, list):
        raise BadRow(f"{place}: {kind_of(history)} is not JSON for a list of [question, answer] pairs.")
    for pair in history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(f"{place}: {kind_of(pair)} is not a [question, answer] pair of texts.")
    return history


def given_messages(row, found, place) -> list[dict]:
    """The messages of a row that lists them: role and content, ShareGPT's from and value, tool turns."""
    if found.messages not in row:
        raise BadRow(f"{place}: no column '{found.messages}' but {list(row)}.{nearest(found.messages, row)}")
    listed = json_cell(row[found.messages])
    place = f"{place}, column '{found.messages}'"
    if not isinstance(listed, list) or not listed:
        raise BadRow(f"{place}: {kind_of(listed)} is found, a list of messages is expected.")
    messages = []
    for number, message in enumerate(listed, 1):
        messages += checked_messages(message, f"{place}, message {number}")
    for number, message in enumerate(messages[1:], 2):
        if message["role"] == "system":
            raise BadRow(f"{place}, message {number}: a system message stands first, and there is one at most.")
    return messages


def checked_messages(message, place) -> list[dict]:
    """The message, or the two that a tool turn or a called function stands for."""
    if not isinstance(message, dict):
        raise BadRow(f"{place}: {kind_of(message)} is found, an object with role and content is expected.")
    given, text = ("from", "value") if "from" in message else ("role", "content")
    role = ROLES.get(message.get(given))
    if role is None:
        raise BadRow(
            f"{place}: the role {message.get(given)!r} is not one of {', '.join(ROLES)}."
            f"{nearest(message.get(given), ROLES)}"
        )
    loss = message.get("loss")
    if loss is not None and not isinstance(loss, bool):
        raise BadRow(f"{place}: loss must be true or false, not {kind_of(loss)}.")
    marked = {} if loss is None else {"loss": loss}
    if role == "tool" and "parameters" in message:
        called = calling(message.get("name"), message["parameters"], place)
        return [{**called, **marked}, {"role": "observation", "content": as_text(message.get("observation"))}]
    content = message.get(text)
    if role == "function_call":
        call = json_cell(content)
        if not isinstance(call, dict) or "name" not in call:
            raise BadRow(f'{place}: {kind_of(content)} is found, {{"name": ..., "arguments": ...}} is expected.')
        return [{**calling(call["name"], call.get("arguments", {}), place), **marked}]
    if role in ("tool", "observation"):
        return [{"role": "observation", "content": as_text(content), **marked}]
    calls = [call.get("function", call) for call in message.get("tool_calls") or []]
    if not isinstance(content, str) and not (calls and content is None):
        raise BadRow(f"{place}: {kind_of(content)} is found, text is expected.")
    tools = {"tools": message["tools"]} if role == "system" and message.get("tools") else {}
    kept = {name: message[name] for name in ("metadata",) if message.get(name)}
    messages = [{"role": role, "content": content, **tools, **kept, **marked}] if content or not calls else []
    return messages + [{**calling(call["name"], call.get("arguments", {}), place), **marked} for call in calls]


def calling(name, arguments, place) -> dict:
    """The assistant message that calls a function."""
    arguments = json_cell(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise BadRow(f"{place}: a call needs a name (text) and its arguments or parameters (an object).")
    function = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [function]}


def as_text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def with_tools(messages, tools, place) -> list[dict]:
    """The messages with the tools in the system message, which is made where there is none."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": "", "tools": tools}, *messages]
    if messages[0].get("tools"):
        raise BadRow(f"{place}: the tools stand both in the row and in its system message.")
    return [{**messages[0], "tools": tools}, *messages[1:]]


def as_template_takes_them(messages, tokenizer) -> tuple[list[dict], list | None]:
    """Messages in the words of a chat template, and the tools where it takes them apart from the messages.

    ChatGLM3 and GLM-4 write calls in a way of their own, and tools in the system message. Other templates that speak
    of tools get `tools`, calls as `tool_calls` and results as role "tool"; where a template knows no tools, or they
    are no list of objects, they are written into the system message as JSON.
    """
    tools = messages[0].get("tools")
    if tools and not ("tools" in str(tokenizer.chat_template) and is_list_of_objects(tools)):
        content = (messages[0]["content"] or TOOLS_PROMPT) + "\n" + json.dumps(tools, ensure_ascii=False, indent=4)
        messages, tools = [{"role": "system", "content": content}, *messages[1:]], None
    if written := getattr(tokenizer, "written_tool_calls", None):
        plain = all(len(message) == 2 for message in messages)  # role and content: most conversations
        return (messages if plain else written(messages)), None
    if tools:
        system = {"role": "system", "content": messages[0]["content"]}
        messages = [system] * bool(system["content"]) + messages[1:]
    return [{**each, "role": "tool"} if each["role"] == "observation" else each for each in messages], tools


def is_list_of_objects(tools) -> bool:
    return isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)


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
    extra = ["source_cut", "target_cut", "row", "problem"]
    encoded = without_bad_rows(encoded, split, rows, training_args)
    if isinstance(encoded, datasets.IterableDataset):
        return encoded.filter(lambda example: warned_if_empty(example, split)).remove_columns(extra)
    kept = np.flatnonzero(encoded.with_format("numpy")["length"][:])
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
    for name, flag in {"source_cut": "max_source_length", "target_cut": "max_target_length"}.items():
        share = np.mean(encoded.with_format("numpy")[name][:])
        if share > 0.01:
            limit = f"--{flag} {getattr(chat_args, flag)}"
            logger.warning(f"{share:.1%} of the {split} examples are cut by {limit}: raise it to keep all of them.")
    return encoded.remove_columns(extra)


def warned_if_empty(example, split) -> bool:
    """Whether a streamed example has something to train on; if not, its row is logged."""
    if not example["input_ids"]:
        logger.warning(f"{split} row {example['row'] + 1} has no question or no answer and is dropped.")
    return bool(example["input_ids"])


def without_bad_rows(encoded, split, rows, training_args):
    """The examples of good rows. The bad ones are counted and listed, with what is wrong, in bad_rows_SPLIT.jsonl."""
    path = Path(training_args.output_dir, f"bad_rows_{split}.jsonl")
    if isinstance(encoded, datasets.IterableDataset):
        return encoded.filter(partial(is_good, path=path))
    problems = encoded["problem"][:]
    bad = {encoded[index]["row"]: problem for index, problem in enumerate(problems) if problem is not None}
    if not bad:
        return encoded
    if training_args.should_save:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{**rows[number], "problem": problem} for number, problem in bad.items()]
        path.write_text("".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines), "utf-8")
    logger.warning(f"{len(bad)} of {len(rows)} {split} rows are bad and left out; they are listed in {path}.")
    return encoded.select([index for index, problem in enumerate(problems) if problem is None])


def is_good(example, path) -> bool:
    """Whether a streamed example comes from a good row; a bad one is logged and listed, each time it is met."""
    if example["problem"] is None:
        return True
    logger.warning(f"{example['problem']} The row is left out; such rows are listed in {path}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"row": example["row"] + 1, "problem": example["problem"]}, ensure_ascii=False) + "\n")
    return False
