"""Which token ids does a conversation make, and which of them are trained?

`templated` builds every prompt, of every model: in training, evaluation and prediction. Shapes: S tokens of a row.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateSyntaxError

from . import chat_rows
from .batches import IGNORE_INDEX
from .mistakes import named


ENDING_TOKENS = 8  # room for what ends an answer: its eos, and what a template writes after it, such as a newline


def is_complete(messages) -> bool:
    """Whether every message has a content, and no answer that is trained is empty."""
    empty = (
        m["content"] is None or (m["loss"] and not m["content"].strip() and not m.get("tool_calls")) for m in messages
    )
    return not any(empty)


def take_template(tokenizer, path):
    """Give a tokenizer the chat template in a file. Raises a ValueError for a file that is none."""
    with named(f"--chat_template {path}", OSError, ValueError, TemplateSyntaxError):
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8-sig")
        tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False)


def templated(tokenizer, messages, **options):
    """What the chat template makes of a conversation. Every prompt, of every model, is built here."""
    messages, tools = chat_rows.as_template_takes_them(messages, tokenizer)
    return tokenizer.apply_chat_template(messages, tools=tools, **options)


def conversation_ids(tokenizer, messages, **options) -> list[int]:
    return templated(tokenizer, messages, return_dict=True, **options)["input_ids"]


def prompt_ids(tokenizer, messages) -> list[int]:
    """Token ids of a conversation up to the cue after which the model answers."""
    return conversation_ids(tokenizer, messages, add_generation_prompt=True)


def reply_ids(tokenizer, messages, prompt) -> list[int]:
    """Token ids that follow `prompt` when the conversation goes on with its last message, an answer.

    A tokenizer that merges across the end of the prompt makes the two texts part there, and is given the rest alone:
    that is how the answer looks when the model generates it.
    """
    whole = conversation_ids(tokenizer, messages)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    before = templated(tokenizer, messages[:-1], add_generation_prompt=True, tokenize=False)
    text = templated(tokenizer, messages, tokenize=False)
    if not text.startswith(before):
        raise ValueError(
            "The chat template writes a conversation with its last answer in another way than the prompt for that "
            f"answer, so that no training example fits both:\n{before!r}\n{text!r}"
        )
    return tokenizer(text[len(before) :], add_special_tokens=False)["input_ids"]


def answers_apart(tokenizer) -> bool:
    """Whether each answer needs an example of its own, because a tokenizer that marks answers writes earlier ones in
    another way: ChatGLM-6B and ChatGLM2, whose rounds are encoded anew. `examples_by_turn` looks at each conversation.
    """
    talk = [{"role": role, "content": "1"} for role in ("user", "assistant", "user")]
    marked = own_end_id(tokenizer) is not None and templated(
        tokenizer, talk[:2], return_dict=True, return_assistant_tokens_mask=True
    )
    first = prompt_ids(tokenizer, talk[:1])
    first += reply_ids(tokenizer, talk[:2], first)
    return bool(marked) and 1 in marked["assistant_masks"] and prompt_ids(tokenizer, talk)[: len(first)] != first


def up_to_answers(messages, apart) -> list[list[dict]]:
    """The conversation up to its last trained message or, where each needs an example of its own, up to each."""
    ends = [number for number, message in enumerate(messages, 1) if message["loss"]]
    return [messages[:end] for end in (ends if apart else ends[-1:])]


class Marked(NamedTuple):
    """A conversation that ends with an answer, its token ids, and a mark (1) on each token that is trained."""

    messages: list[dict]
    ids: list[int]
    marks: bytes  # searched ten times as fast as a list
    left_out: bool = False  # whether the template leaves out what a message says


def marked_ids(tokenizer, conversations) -> list[list[Marked]]:
    """The marked ids of each conversation; several where its answers do not fit into one.

    ChatGLM's tokenizers mark the answers themselves, all conversations in one call. For any other, and for ChatGLM
    with a template of the user's own, the answers are found turn by turn: an answer is what follows its prompt.
    """
    if conversations and own_end_id(tokenizer) is not None:
        batch = [chat_rows.as_template_takes_them(messages, tokenizer)[0] for messages in conversations]
        encoded = tokenizer.apply_chat_template(batch, return_dict=True, return_assistant_tokens_mask=True)
        marks = map(bytes, encoded["assistant_masks"])
        marked = [Marked(*each) for each in zip(conversations, encoded["input_ids"], marks, strict=True)]
        if all(1 in each.marks for each in marked):
            return [[each] for each in marked]
    return [list(examples_by_turn(tokenizer, messages)) for messages in conversations]


def own_end_id(tokenizer) -> int | None:
    """The token that ends an answer of ChatGLM; None for tokenizers whose chat template writes the end itself."""
    return getattr(tokenizer, "end_of_reply_token_id", None)


def examples_by_turn(tokenizer, messages) -> Iterator[Marked]:
    """The marked ids of one conversation, through any chat template.

    Where a prompt writes earlier answers in another way than they were generated (without their thoughts), these are
    an example of their own, and the next begins with that prompt: each answer is trained once, behind its own prompt.
    """
    ids, marks, reply, begun, done = [], [], [], 0, 0  # messages[begun:done] are in the example at hand
    for end, message in enumerate(messages, 1):
        answer, trained = message["role"] == "assistant", message["loss"]
        if not answer and not trained:
            continue
        before = messages[: end - 1]
        prompt = conversation_ids(tokenizer, before, add_generation_prompt=answer) if before else []
        if prompt[: len(ids)] != ids:
            if 1 in marks:
                yield marked_example(tokenizer, messages[:done], begun, ids, marks)
                begun = done
            ids, marks = [], []
        added = [0] * (len(prompt) - len(ids))
        if added and marks and marks[-1] and tokenizer.eos_token_id not in reply:
            added[0] = 1  # the next role's token is what ends such an answer
        reply = reply_ids(tokenizer, messages[:end], prompt)
        ids, marks, done = prompt + reply, marks + added + [int(trained)] * len(reply), end
    yield marked_example(tokenizer, messages[:done], begun, ids, marks)


def marked_example(tokenizer, messages, begun, ids, marks) -> Marked:
    """The example; ValueError if the template leaves out a thought of the messages that are new in it."""
    new = [message for message in messages[begun:] if message["loss"] or message["role"] != "assistant"]
    said = [(name, message[name]) for message in new for name in ("content", "reasoning_content") if message.get(name)]
    missing = {name for name, text in said if words_of(text) not in words_of(tokenizer.decode(ids))}
    if missing:  # perhaps only in the tokenizer's spelling
        text = words_of(templated(tokenizer, messages, tokenize=False))
        missing = {name for name, each in said if words_of(each) not in text}
    if "reasoning_content" in missing:
        raise ValueError("The chat template leaves out the reasoning_content of an answer that is to be trained.")
    return Marked(messages, ids, bytes(marks), bool(missing))


def words_of(text) -> str:
    """A text without its white space, which templates trim."""
    return "".join(text.split())


def answer_start(marks) -> int:
    """Where the last answer begins: behind the last token that is not trained."""
    return marks.rindex(0) + 1


def answer_length(answer, end) -> int:
    """Tokens of an answer without what ends it: its end token and what a template writes after that."""
    ending = answer[: -ENDING_TOKENS - 1 : -1]  # from the last token on
    return len(answer) - (ending.index(end) + 1 if end in ending else 0)


def without_oldest_turns(tokenizer, messages, limit) -> list[dict]:
    """The conversation with a prompt of at most `limit` tokens: the last question and the answer cue stay.

    First the oldest turns go, then the longest message is shortened from its end. Raises a ValueError if the format
    of the prompt alone is longer than the limit.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) : -1]
    while (excess := len(prompt_ids(tokenizer, system + turns)) - limit) > 0:
        starts = [i for i, message in enumerate(turns) if message["role"] == "user"]
        if len(starts) > 1:
            turns = turns[starts[1] :]
            continue
        longest = max(system + turns, key=lambda message: len(message["content"]))
        ids = tokenizer(longest["content"], add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"--max_source_length {limit} is {excess} tokens too short for an empty question.")
        shorter = {**longest, "content": tokenizer.decode(ids[: max(0, len(ids) - excess)]).rstrip("\ufffd")}
        system, turns = ([shorter if m is longest else m for m in part] for part in (system, turns))
    return system + turns + messages[-1:]


@contextmanager
def frozen_libraries():
    """In the block the million objects that the libraries have made are not looked through for each batch, which takes
    a quarter of the time. Frozen until the end, those of Triton would be reported as leaks, 30 lines with torch 2.15.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def encoded_conversations(tokenizer, conversations, chat_args) -> list[list[dict]]:
    """The examples of each conversation: rows with `input_ids` and `labels` [S], within the two length limits."""
    marked = marked_ids(tokenizer, conversations)
    end = own_end_id(tokenizer) or tokenizer.eos_token_id  # row by row it would be 4 % of the time
    return [[limited_example(tokenizer, example, chat_args, end) for example in examples] for examples in marked]


def limited_example(tokenizer, example, chat_args, end) -> dict:
    """The row of an example, cut to the two limits.

    An answer is cut to --max_target_length, and then ends with what ended it before (its eos token and what follows),
    or with the end token if the template writes none: the end of an answer is always trained.
    """
    messages, ids, marks, left_out = example
    start = answer_start(marks)
    source_cut = start > chat_args.max_source_length
    if source_cut:
        short = without_oldest_turns(tokenizer, messages, chat_args.max_source_length)
        _, ids, marks, _ = marked_ids(tokenizer, [short])[0][-1]
        start = answer_start(marks)
    length = answer_length(ids[start:], end)
    ids[start + min(length, chat_args.max_target_length) :] = ids[start + length :] or [end]
    labels = [IGNORE_INDEX] * start + ids[start:]
    for i in range(start) if 1 in marks[:start] else ():  # earlier answers
        labels[i] = ids[i] if marks[i] else IGNORE_INDEX
    return {
        "input_ids": ids,
        "labels": labels,
        "length": len(ids),
        "source_cut": source_cut,
        "target_cut": length > chat_args.max_target_length,
        "left_out": left_out,
    }
