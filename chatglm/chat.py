"""`chat` and `stream_chat` as the published models offer them, on top of apply_chat_template and generate."""

import ast
import json
from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from transformers import (
    BatchEncoding,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from .library_names import CACHE


TRAINING_TIME = "[[训练时间]]"  # the models were taught to write this for the date


class FiniteScores(LogitsProcessor):
    """Makes scores with infinities or NaN, for which sampling would fail, decide for one harmless token."""

    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if torch.isfinite(scores).all():
            return scores
        scores = torch.zeros_like(scores)  # [B, V]
        scores[:, self.token_id] = 5e4
        return scores


class StopOn(StoppingCriteria):
    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class IdQueue(BaseStreamer):
    """Hands ids over to another thread; the prompt, which `generate` puts first, comes as one tensor."""

    def __init__(self):
        self.queue = SimpleQueue()

    def put(self, value: torch.Tensor):
        self.queue.put(value)

    def end(self):
        pass


def python_call_arguments(text: str) -> dict[str, Any] | None:
    """The keyword values of `tool_call(...)` in ChatGLM3's fenced code, read as literals and never run."""
    code = "\n".join(text.split("\n")[1:-1])
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "tool_call" or call.args:
            return None
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError):
        return None
    return None if None in arguments else arguments  # from **


def json_arguments(text: str) -> dict[str, Any] | None:
    """GLM-4's arguments of a tool call."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) else None


def generated_ids(model, **options) -> Iterator[int]:
    """Ids of `model.generate` one by one. It runs in a thread, which ends when nobody listens any more."""
    streamer, closed = IdQueue(), Event()
    criteria = StoppingCriteriaList([*(options.pop("stopping_criteria", None) or []), StopOn(closed)])
    end = object()

    def run():
        try:
            model.generate(**options, streamer=streamer, stopping_criteria=criteria)
            streamer.put(end)
        except BaseException as error:
            streamer.put(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        prompt = streamer.queue.get()
        if isinstance(prompt, BaseException):
            raise prompt
        while (token := streamer.queue.get()) is not end:
            if isinstance(token, BaseException):
                raise token
            yield token.item()
    finally:
        closed.set()
        thread.join()


class ChatMixin:
    """For models whose tokenizer has `stop_token_ids` and a chat template.

    With `history_of_pairs` a history is a list of (question, reply), otherwise a list of messages.
    """

    chat_defaults = {"max_length": 8192, "num_beams": 1, "do_sample": True, "top_p": 0.8, "temperature": 0.8}
    history_of_pairs = False
    tool_arguments = staticmethod(python_call_arguments)

    def chat(self, tokenizer, query: str, history: list | None = None, role: str = "user", **options):
        """The reply to one more message, and the history with both; options of `generate` override the published ones.

        The reply of a tool call is a dict of `name` and either `parameters` (if the system message had tools) or
        `content`. The history passed in is left as it is.
        """
        messages = self.chat_messages(query, history, role)
        inputs = self.chat_inputs(tokenizer, messages)
        output_ids = self.generate(**inputs, **self.chat_options(tokenizer, options))
        reply_ids = output_ids[0, inputs["input_ids"].shape[1] :].tolist()
        return self.chat_reply(tokenizer, reply_ids, query, history, messages)

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list | None = None,
        role: str = "user",
        past_key_values: DynamicCache | None = None,
        return_past_key_values: bool = False,
        **options,
    ) -> Iterator[tuple]:
        """Yields (reply so far, history) token by token, and with `return_past_key_values` the cache as well.

        With that cache passed on, the next call computes the new turn only. Raises ValueError for a cache of a model
        with a trained prefix, whose length it would count.
        """
        messages = self.chat_messages(query, history, role)
        if past_key_values is None:
            inputs = self.chat_inputs(tokenizer, messages)
            past_key_values = DynamicCache(config=self.config)
        else:
            inputs = self.continued(tokenizer, messages, past_key_values)
        options = {**self.chat_options(tokenizer, options), CACHE: past_key_values}
        reply_ids = []
        for token_id in generated_ids(self, **inputs, **options):
            reply_ids.append(token_id)
            response, new_history = self.chat_reply(tokenizer, reply_ids, query, history, messages)
            if isinstance(response, dict) or (response and not response.endswith("\ufffd")):  # not half a character
                extra = (past_key_values,) if return_past_key_values else ()
                yield response, new_history, *extra

    def chat_messages(self, query: str, history: list | None, role: str = "user") -> list[dict[str, Any]]:
        """History and query as messages of the chat template."""
        messages = list(history or [])
        if self.history_of_pairs:
            roles = ("user", "assistant")
            messages = [
                {"role": who, "content": text} for turn in messages for who, text in zip(roles, turn, strict=True)
            ]
        return [*messages, {"role": role, "content": query}]

    def chat_inputs(self, tokenizer, messages: list[dict[str, Any]]) -> BatchEncoding:
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        return inputs.to(self.device)

    def fallback_token_id(self, tokenizer) -> int:
        """What a reply goes on with where half precision has made NaN or infinity of a score."""
        return 5

    def process_response(self, output: str, history: list[dict[str, Any]]) -> tuple[Any, list[dict[str, Any]]]:
        """The answer in a decoded reply and the messages with the reply; several parts may follow each other."""
        if self.history_of_pairs:
            return output.strip().replace(TRAINING_TIME, "2023年"), history
        history, response = list(history), ""
        for part in output.split("<|assistant|>"):
            metadata, newline, content = part.partition("\n")
            if not newline:
                metadata, content = "", part
            metadata, plain = metadata.strip(), not metadata.strip()
            content = content.strip() if plain else content
            history.append({"role": "assistant", "metadata": metadata, "content": content})
            if plain:
                response = content.replace(TRAINING_TIME, "2023年")
                continue
            has_tools = history[0]["role"] == "system" and "tools" in history[0]
            parameters = self.tool_arguments(content) if has_tools else None
            response = {"name": metadata, "content": content}
            if parameters is not None:
                response = {"name": metadata, "parameters": parameters}
        return response, history

    def chat_reply(self, tokenizer, ids: list[int], query: str, history: list | None, messages: list[dict]):
        ids = ids[:-1] if ids and ids[-1] in tokenizer.stop_token_ids else ids
        response, messages = self.process_response(tokenizer.decode(ids), messages)
        return response, [*(history or []), (query, response)] if self.history_of_pairs else messages

    def chat_options(self, tokenizer, options: dict[str, Any]) -> dict[str, Any]:
        guard = LogitsProcessorList(
            [*(options.pop("logits_processor", None) or []), FiniteScores(self.fallback_token_id(tokenizer))]
        )
        defaults = {**self.chat_defaults, "eos_token_id": tokenizer.stop_token_ids, "logits_processor": guard}
        if options.get("max_new_tokens"):
            del defaults["max_length"]
        return {**defaults, **options}

    def continued(self, tokenizer, messages: list[dict[str, Any]], cache: DynamicCache):
        """Inputs for the last message; `generate` wants ids for what the cache holds too, but does not read them."""
        if self.config.pre_seq_len:
            raise ValueError("A model with pre_seq_len cannot go on from past_key_values; pass the history alone.")
        new_ids = torch.tensor([tokenizer.continuation_of_chat(messages)])
        ids = torch.nn.functional.pad(new_ids, (cache.get_seq_length(), 0))
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).to(self.device)
