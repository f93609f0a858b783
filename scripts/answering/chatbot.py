"""A model that answers conversations, for the terminal and for the page."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel

from chatglm.chat import generated_ids
from finetuning.adapters import stop_ids
from finetuning.mistakes import named
from run_chatglm_lora import padding_id


class Chatbot:
    """A model that answers conversations, which are kept by whoever asks.

    `options` go to `generate`; `reply` holds the ids of the latest answer so far. Raises ValueError for tools where
    the model does not call any.
    """

    def __init__(self, model, tokenizer, options: dict[str, Any], tools: list[dict] | None = None):
        if tokenizer.chat_template is None:
            raise ValueError("The tokenizer of this model has no chat template, so it knows no conversations.")
        self.model, self.tokenizer, self.tools = model, tokenizer, tools
        self.has_adapter, self.reply = isinstance(model, PeftModel), []
        stops = stop_ids(tokenizer, model.generation_config.eos_token_id)
        self.calls_end_with = tokenizer.convert_tokens_to_ids("<|observation|>")
        if tools and self.calls_end_with not in stops:
            raise ValueError("This model was not made to call tools (ChatGLM3 and GLM-4 are): leave --tools out.")
        self.options = {**options, "eos_token_id": stops, "pad_token_id": padding_id(tokenizer)}
        self.positions = getattr(model.config, "max_position_embeddings", None)
        if self.positions:
            self.options["max_new_tokens"] = min(self.options["max_new_tokens"], self.positions // 2)

    def prompt(self, messages: list[dict], max_new_tokens: int | None = None) -> tuple[list[int], int]:
        """Ids of a conversation up to the cue for an answer, and how many of its oldest turns had no room.

        Room is kept for an answer of `max_new_tokens`. Raises ValueError where the last question alone has none.
        """
        length = max_new_tokens or self.options["max_new_tokens"]
        with named("The conversation holds what is no text", UnicodeEncodeError):  # of a terminal, as surrogates
            json.dumps(messages, ensure_ascii=False).encode()
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns, dropped = messages[len(system) :], 0
        while True:
            ids = self.tokenizer.apply_chat_template(
                system + turns, tools=self.tools, add_generation_prompt=True, return_dict=True
            )["input_ids"]
            if not self.positions or len(ids) + length <= self.positions:
                return ids, dropped
            starts = [index for index, message in enumerate(turns) if message["role"] == "user"]
            if len(starts) < 2:
                raise ValueError(
                    f"The question makes a prompt of {len(ids)} tokens. The model has {self.positions} positions, of "
                    f"which {length} are kept for the answer (--max_new_tokens): shorten it."
                )
            turns, dropped = turns[starts[1] :], dropped + 1

    def answer(self, ids: list[int], from_base: bool = False, **options) -> Iterator[dict]:
        """The message that answers a prompt, as far as it has come, again and again until it is complete.

        `from_base`: without the adapter. `options` override those of the chatbot. A complete call of a tool has the
        tool's name as `metadata`.
        """
        given = torch.tensor([ids], device=self.model.device)  # [1, S]
        reply = self.reply = []
        inputs = {"input_ids": given, "attention_mask": torch.ones_like(given)}
        with self.model.disable_adapter() if from_base else nullcontext():
            for token in generated_ids(self.model, **inputs, **{**self.options, **options}):
                reply.append(token)
                # All of it each time: decoded by pieces, SentencePiece drops the blank that a piece begins with.
                text = self.tokenizer.decode(reply, skip_special_tokens=True)
                if token == self.calls_end_with:
                    name, _, call = text.partition("\n")
                    yield {"role": "assistant", "metadata": name.strip(), "content": call.strip()}
                elif not text.endswith("\ufffd"):  # half a character
                    yield {"role": "assistant", "content": text.strip()}


def training_row(messages: list[dict], tools: list[dict] | None) -> str:
    """A conversation as a line of a file that the training reads."""
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    return json.dumps(row, ensure_ascii=False) + "\n"


def is_call(message: dict | None) -> bool:
    """Whether a message calls a tool, so that the tool's result comes next."""
    return bool(message and message.get("metadata"))


def text_of(message: dict) -> str:
    return "\n".join([message["metadata"], message["content"]]) if is_call(message) else message["content"]


def next_message(messages: list[dict], text: str) -> dict:
    """What a user writes: a question or, after the call of a tool, what that returns."""
    called = bool(messages) and is_call(messages[-1])
    return {"role": "observation" if called else "user", "content": text}
