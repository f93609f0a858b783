"""What the tokenizers of ChatGLM-6B to GLM-4 share: prompts encoded part by part, masks, positions, padding."""

import json
import os
from itertools import accumulate, chain
from typing import Any, NamedTuple

from tokenizers import Tokenizer, processors
from transformers import BatchEncoding, TokenizersBackend
from transformers.utils import get_json_schema


VOCAB_FILES_NAMES = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
ROLE_TOKENS = {role: f"<|{role}|>" for role in ("system", "user", "assistant", "observation")}
# Before any template. An answer begins with the newline and the blank that follow its role in the prompt; servers hand
# it back in the history as it came, and untrimmed it would stand there with two of each, as in no training example.
TRIMMED_ANSWERS = """\
{%- set given = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' and message['content'] is string and not message['tool_calls'] -%}
{%- set answer = {'role': 'assistant', 'content': message['content'] | trim, 'metadata': message['metadata']} -%}
{%- set given.messages = given.messages + [answer] -%}
{%- else -%}
{%- set given.messages = given.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = given.messages -%}
"""


class Part(NamedTuple):
    """A piece of a prompt that is encoded on its own: a special token or a text."""

    text: str
    trained: bool = False
    special: bool = False


def config_beside(vocab_file: str | None) -> dict[str, Any]:
    """The config.json in the folder of the vocabulary, or nothing."""
    path = os.path.join(os.path.dirname(vocab_file or ""), "config.json")
    if not (vocab_file and os.path.isfile(path)):
        return {}
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def position_ids_of(attention_mask: list[int]) -> list[int]:
    """0, 1, 2, ... over the real tokens, 0 on padding."""
    if 0 not in attention_mask:
        return list(range(len(attention_mask)))
    return [real * (seen - 1) for real, seen in zip(attention_mask, accumulate(attention_mask), strict=True)]


def new_tokens(added_tokens: dict[int, Any], backend: Tokenizer) -> dict[int, Any]:
    """The saved tokens that the backend does not have yet."""
    known = backend.get_vocab()
    return {index: token for index, token in added_tokens.items() if str(token) not in known}


def turns_of(messages: list[dict[str, Any]], model_name: str) -> list[dict[str, Any]]:
    """The messages after a system message at most; ValueError unless question and reply take turns in them."""
    first = int(messages[0]["role"] == "system")
    for index, message in enumerate(messages[first:]):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            raise ValueError(
                f"Message {first + index + 1} has role {message['role']!r} where {model_name} needs {expected!r}: "
                "its prompt is made of rounds, a question and a reply in turn."
            )
    return messages[first:]


def is_trained(message: dict[str, Any]) -> bool:
    """Whether a reply is learnt: assistant messages are, unless their own `loss` key says otherwise."""
    loss = message.get("loss")
    return message["role"] == "assistant" if loss is None else bool(loss)


class PartsTokenizer(TokenizersBackend):
    """A fast tokenizer whose chat prompts are lists of `Part`, which subclasses make in `_parts`.

    Special tokens written out in a message stay text. The training mask is decided where a part is made. Where
    `counts_positions`, rows have `position_ids` 0, 1, 2, ...
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"
    counts_positions = True
    prefix: list[str] = []  # opens every sequence
    suffix: list[str] = []  # closes every prompt
    end_of_pair: str
    generation: str
    roles: dict[str, str]  # role tokens by role; none where the prompt is made of rounds
    tools_prompt = ""  # content of a system message that is there for its tools only

    @classmethod
    def convert_to_native_format(cls, **kwargs) -> dict[str, Any]:
        return kwargs  # __init__ reads the files itself

    def update_post_processor(self):
        single = [*self.prefix, "$A:0", *self.suffix]
        added = [*self.prefix, *self.suffix, self.end_of_pair]
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, "$B:0", self.end_of_pair],
            special_tokens=[(token, self._tokenizer.token_to_id(token)) for token in added],
        )

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end a reply: the end token and, where roles have tokens, that of whoever speaks next."""
        names = [self.roles[role] for role in ("user", "observation") if role in self.roles]
        return [self.eos_token_id, *self.convert_tokens_to_ids(names)]

    @property
    def end_of_reply_token_id(self) -> int:
        """The id that a model learns to end a conversation with."""
        return self.eos_token_id

    def continuation_of_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Ids of the last message and the cue for a reply, to go on from a cache that holds all before them."""
        ids = self.apply_chat_template(messages[-1:], add_generation_prompt=True)["input_ids"]
        return ids[len(self.prefix) :]

    def written_tool_calls(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages whose `tool_calls`, as other models' templates take them, are written as this model writes calls.

        A call is an assistant message with the function's name as metadata. Raises ValueError where the model's
        prompt has no place for calls or tools.
        """
        written = []
        for message in messages:
            calls = [call["function"] for call in message.get("tool_calls") or []]
            if (calls or message.get("metadata")) and not self.roles:
                raise ValueError(f"{self.generation} has no prompt for calls of tools; ChatGLM3 and GLM-4 have.")
            if message.get("tools") and not message["content"]:
                message = {**message, "content": self.tools_prompt}
            rest = {name: value for name, value in message.items() if name != "tool_calls"}
            if not calls or rest["content"]:
                written.append(rest)
            texts = [(call["name"], self._call_text(call["arguments"])) for call in calls]
            written += [{**rest, "metadata": name, "content": text} for name, text in texts]
        return written

    def _call_text(self, arguments: dict[str, Any]) -> str:
        return json.dumps(arguments, ensure_ascii=False)

    def _own_prompt(self, template: str) -> bool:
        """Whether `_parts` makes the prompt that a template describes."""
        raise NotImplementedError

    def _parts(self, messages: list[dict], tools: list, cue: bool, template: str) -> list[Part]:
        """The parts of a prompt after the prefix, a suffix among them; with `cue` it asks for a reply."""
        raise NotImplementedError

    def _text_of(self, parts: list[Part]) -> str:
        """The prompt as text: tokenised with special tokens found in it, it gives the ids of the parts."""
        return "".join(part.text for part in parts)

    def _encode_plus(self, text, text_pair=None, **options) -> BatchEncoding:
        if not isinstance(text, str) or text_pair != "":
            return super()._encode_plus(text=text, text_pair=text_pair, **options)
        # The library takes one empty text for no text, and would leave out the token that ends a pair; in a batch not.
        encoding = super()._encode_plus(text=[text], text_pair=[text_pair], **options)
        if options.get("return_tensors") or options.get("return_overflowing_tokens"):
            return encoding
        single = {name: rows[0] if isinstance(rows[0], list) else rows for name, rows in encoding.items()}
        return BatchEncoding(single, encoding.encodings)

    def _convert_encoding(self, encoding, *args, **kwargs):
        columns, encodings = super()._convert_encoding(encoding, *args, **kwargs)
        if self.counts_positions and "position_ids" in self.model_input_names:
            columns["position_ids"] = [position_ids_of(each.attention_mask) for each in encodings]
        return columns, encodings

    def _pad(self, encoded_inputs, *args, padding_side: str | None = None, **kwargs):
        real = len(encoded_inputs["input_ids"])
        own_columns = {"assistant_masks"}
        if self.counts_positions:
            own_columns.add("position_ids")
            if "position_ids" in self.model_input_names and "position_ids" not in encoded_inputs:
                encoded_inputs["position_ids"] = position_ids_of(encoded_inputs.get("attention_mask", [1] * real))
        encoded = super()._pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)
        zeros = [0] * (len(encoded["input_ids"]) - real)
        for column in own_columns & set(encoded):
            left = (padding_side or self.padding_side) == "left"
            encoded[column] = zeros + encoded[column] if left else encoded[column] + zeros
        return encoded

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return files + self.save_vocabulary(save_directory, filename_prefix) if self.can_save_slow_tokenizer else files

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        tools: list | None = None,
        documents: list[dict] | None = None,
        chat_template: str | None = None,
        **options,
    ):
        """The published prompt of one conversation or a batch of them, every part encoded on its own.

        The options are those of the library. Messages are dicts of `role` and `content`, and from ChatGLM3 on also
        `metadata`, and `tools` in the system message. No end token is appended. With `return_assistant_tokens_mask`,
        `assistant_masks` marks what a model should learn: each assistant message and the role token after it, with
        ChatGLM-6B and ChatGLM2 the final reply; a message's own `loss` key (true or false) takes precedence. Raises
        ValueError for an unknown role. A chat template other than the published one is left to the library.
        """
        template = chat_template or self.chat_template
        if self._own_prompt(template):
            return self._published_chat(conversation, tools, template, **options)
        encoding = {"split_special_tokens": False, **(options.pop("tokenizer_kwargs", None) or {})}
        return super().apply_chat_template(
            conversation, tools, documents, chat_template, tokenizer_kwargs=encoding, **options
        )

    def _published_chat(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        tools: list | None,
        template: str,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **template_variables,
    ):
        """`apply_chat_template` without Jinja; the published prompts have no further variables."""
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "Choose one of continue_final_message and add_generation_prompt: the reply is open or new."
            )

        batched = len(conversation) > 0 and not isinstance(conversation[0], dict)
        conversations = conversation if batched else [conversation]
        tools = [get_json_schema(tool) if callable(tool) else tool for tool in tools or []]
        prefix = [Part(token, special=True) for token in self.prefix]
        prompts = [
            prefix + self._prompt(messages, tools, add_generation_prompt, template) for messages in conversations
        ]
        if not tokenize:
            texts = [self._text_of(parts) for parts in prompts]
            return texts if batched else texts[0]

        columns = self._encode_prompts(prompts)
        if not return_assistant_tokens_mask:
            del columns["assistant_masks"]
        if truncation:
            limit = max_length or self.model_max_length
            kept = slice(-limit, None) if self.truncation_side == "left" else slice(limit)
            columns = {name: [row[kept] for row in rows] for name, rows in columns.items()}
        columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
        if self.counts_positions:
            positions = list(range(max(map(len, columns["input_ids"]))))  # sliced: a third of the time of range()
            columns["position_ids"] = [positions[: len(ids)] for ids in columns["input_ids"]]
        encoding = BatchEncoding(columns)
        if padding or return_tensors or tokenizer_kwargs:
            encoding = self.pad(
                columns,
                padding=padding,
                max_length=max_length,
                return_tensors=return_tensors,
                **(tokenizer_kwargs or {}),
            )
        if not batched and return_tensors is None:
            encoding = BatchEncoding({name: rows[0] for name, rows in encoding.items()})
        return encoding if return_dict else encoding["input_ids"]

    def _prompt(self, messages: list[dict], tools: list, cue: bool, template: str) -> list[Part]:
        """`_parts` of messages that were checked."""
        if not messages:
            raise ValueError("A conversation needs at least one message.")
        return self._parts([self._checked(message) for message in messages], tools, cue, template)

    def _checked(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message, with "" for a content that is missing; ValueError where role or content is not known."""
        known = self.roles or ("system", "user", "assistant")
        role, content = message.get("role"), message.get("content")
        if role not in known:
            raise ValueError(f"Unknown role {role!r}: {self.generation} knows {', '.join(known)}.")
        if isinstance(content, str):
            return message
        if content:
            raise ValueError(f"The content of a {role} message must be text, got {content!r}.")
        return {**message, "content": ""}

    def _encode_prompts(self, prompts: list[list[Part]]) -> dict[str, list[list[int]]]:
        """Ids and training masks of all prompts, with all their texts in one call of the backend."""
        backend = self._tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # that is, as text
        tokens, texts = set(), set()  # each once: newlines come often
        for text, _, special in chain.from_iterable(prompts):
            (tokens if special else texts).add(text)
        ids_of_token = {token: [backend.token_to_id(token)] for token in tokens}
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ids_of_text = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        input_ids, masks = [], []
        for parts in prompts:
            ids, mask = [], []
            for text, trained, special in parts:
                ids += ids_of_token[text] if special else ids_of_text[text]
                mask += [int(trained)] * (len(ids) - len(mask))
            input_ids.append(ids)
            masks.append(mask)
        return {"input_ids": input_ids, "assistant_masks": masks}
