"""Tokenizer of ChatGLM2-6B, ChatGLM3-6B and CodeGeeX2-6B, with their published prompts as chat template."""

import json
import os
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import TokenizersBackend
from transformers.tokenization_utils_base import BatchEncoding
from transformers.utils.chat_template_utils import get_json_schema

from .configuration_chatglm import GENERATIONS, SECOND_GENERATION, generation_of


VOCAB_FILES_NAMES = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
PREFIX = ["[gMASK]", "sop"]  # opens every sequence
APPENDED = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]  # ids after the SentencePiece vocabulary, in this order
ROLES = {
    "chatglm2": {},
    "codegeex2": {},
    "chatglm3": {role: f"<|{role}|>" for role in ("system", "user", "assistant", "observation")},
}
TOOLS_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"

ROUNDS_TEMPLATE = """\
{{- '[gMASK]sop ' -}}
{%- set state = namespace(round=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' and loop.first -%}
{{- message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{%- set state.round = state.round + 1 -%}
{{- '[Round ' ~ state.round ~ ']\\n\\n问：' + message['content'] -}}
{%- if add_generation_prompt or not loop.last -%}{{- '\\n\\n答：' -}}{%- endif -%}
{%- elif message['role'] == 'assistant' -%}
{%- if not loop.last -%}
{{- message['content'] + '\\n\\n' -}}
{%- elif message['content'] -%}
{{- ' ' + message['content'] -}}
{%- endif -%}
{%- else -%}
{{- raise_exception('This model has no role ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}"""

ROLES_TEMPLATE = """\
{%- macro content_of(message, functions) -%}
{{- message['content'] -}}
{%- if functions -%}{{- '\\n' + functions | tojson(indent=4) -}}{%- endif -%}
{%- endmacro -%}
{{- '[gMASK]sop' -}}
{%- if tools and messages[0]['role'] != 'system' -%}
{{- '<|system|>\\n TOOLS_PROMPT\\n' + tools | tojson(indent=4) -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant', 'observation'] -%}
{{- raise_exception('This model has no role ' + message['role']) -}}
{%- endif -%}
{%- set functions = false -%}
{%- if message['role'] == 'system' -%}{%- set functions = message['tools'] or (tools if loop.first) -%}{%- endif -%}
{%- set content = content_of(message, functions) -%}
{{- '<|' + message['role'] + '|>' + (message['metadata'] or '') + '\\n' -}}
{%- if content -%}{{- ' ' + content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}""".replace("TOOLS_PROMPT", TOOLS_PROMPT)


CHAT_TEMPLATES = {generation: ROLES_TEMPLATE if ROLES[generation] else ROUNDS_TEMPLATE for generation in GENERATIONS}


class Part(NamedTuple):
    """A piece of a prompt that is encoded on its own: a special token or a text with its own leading blank."""

    text: str
    special: bool = False
    trained: bool = False


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The BPE merges behind SentencePiece's scores: every split of a piece into two pieces, best piece first."""
    merges = []
    for piece in sorted(scores, key=scores.get, reverse=True):
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(left, right) for left, right in splits if left in scores and right in scores]
    return merges


def backend_from_sentencepiece(vocab_file: str, generation: str) -> Tokenizer:
    """The published tokenizer.model, followed by the special tokens of the generation, as a `tokenizers` backend."""
    model = SentencePieceProcessor(model_file=vocab_file)
    pieces = [model.id_to_piece(index) for index in range(len(model))]
    named = [piece for index, piece in enumerate(pieces) if model.is_control(index) or model.is_unknown(index)]
    scores = {
        piece: model.get_score(index)
        for index, piece in enumerate(pieces)
        if piece not in named and not model.is_byte(index)
    }
    appended = [*APPENDED, *ROLES[generation].values()]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *appended])}

    backend = Tokenizer(BPE(vocabulary, merges_of(scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # Not Metaspace: it leaves out the leading blank where the text begins with one.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Programs that load tokenizer.json alone look for these in text: "sop" must not be found inside "philosophy".
    for token in [*named, *appended]:
        word = token.isalpha()
        backend.add_special_tokens([AddedToken(token, single_word=word, rstrip=word, normalized=False, special=True)])
    return backend


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


def is_trained(message: dict[str, Any]) -> bool:
    """Whether a reply is learnt: assistant messages are, unless their own `loss` key says otherwise."""
    loss = message.get("loss")
    return message["role"] == "assistant" if loss is None else bool(loss)


def role_parts(messages: list[dict], tools: list | None, cue: bool, roles: dict[str, str]) -> Iterator[Part]:
    """ChatGLM3: role token, metadata and newline, content; a reply is ended by the next role token."""
    if tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": TOOLS_PROMPT}, *messages]
    trained = False
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "system" and (functions := message.get("tools") or (tools if index == 0 else None)):
            content += "\n" + json.dumps(functions, indent=4, ensure_ascii=False)
        yield Part(roles[message["role"]], special=True, trained=trained)
        trained = is_trained(message)
        yield Part((message.get("metadata") or "") + "\n", trained=trained)
        yield Part(content, trained=trained)
    if cue:
        yield Part(roles["assistant"], special=True, trained=trained)


def round_parts(messages: list[dict], cue: bool) -> Iterator[Part]:
    """ChatGLM2: all rounds up to the last 答： as one text, then the final reply."""
    first = int(messages[0]["role"] == "system")
    text = messages[0]["content"] + "\n\n" if first else ""
    messages = messages[first:]
    for index, message in enumerate(messages):
        last = index == len(messages) - 1
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            raise ValueError(
                f"Message {first + index + 1} has role {message['role']!r} where ChatGLM2 needs {expected!r}: "
                "its prompt is made of rounds, a question and a reply in turn."
            )
        if message["role"] == "user":
            text += f"[Round {index // 2 + 1}]\n\n问：{message['content']}" + ("" if last and not cue else "\n\n答：")
        elif not last:
            text += message["content"] + "\n\n"
    yield Part(text)
    if messages and messages[-1]["role"] == "assistant":
        yield Part(messages[-1]["content"], trained=is_trained(messages[-1]))


def text_of(parts: list[Part]) -> str:
    """The prompt as text: tokenised with special tokens found in it, it gives the ids of the parts."""
    text = ""
    for previous, part in zip([None, *parts[:-1]], parts, strict=True):
        follows_role = previous is None or (previous.special and previous.text not in PREFIX)
        text += part.text if part.special or follows_role or not part.text else " " + part.text
    return text


class ChatGLMTokenizer(TokenizersBackend):
    """Fast tokenizer over the published tokenizer.model.

    Special tokens written out in a text stay text, except that ChatGLM3's `encode_special_tokens=True` finds the four
    role tokens. `generation` ("chatglm2", "codegeex2", "chatglm3") is read from the config.json beside the vocabulary
    where it is not given. Raises ValueError without a vocabulary file.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        generation: str | None = None,
        encode_special_tokens: bool = False,
        **kwargs,
    ):
        if vocab_file is None and tokenizer_file is None:
            raise ValueError("ChatGLMTokenizer found no tokenizer.model; copy the published one into the folder.")
        if generation is None:  # a published folder, whose template (if any) knows neither tools nor metadata
            generation = generation_of(config_beside(vocab_file), kwargs.get("name_or_path", ""))
            kwargs.pop("chat_template", None)
        self.generation = generation
        self.roles = ROLES[generation]
        self.encode_special_tokens = encode_special_tokens
        self._tokenizer = self._backend(vocab_file, tokenizer_file)

        known = self._tokenizer.get_vocab()
        added = kwargs.pop("added_tokens_decoder", {})
        kwargs["added_tokens_decoder"] = {index: token for index, token in added.items() if str(token) not in known}
        kwargs.pop("split_special_tokens", None)
        for name, token in (("unk_token", "<unk>"), ("pad_token", "<unk>"), ("eos_token", "</s>")):
            kwargs.setdefault(name, token)
        kwargs.setdefault("chat_template", CHAT_TEMPLATES[generation])
        super().__init__(
            vocab_file=vocab_file, generation=generation, encode_special_tokens=encode_special_tokens, **kwargs
        )
        # Special tokens in text stay text. Not saved: whoever loads tokenizer.json alone needs them to be found.
        self.split_special_tokens = True

    @classmethod
    def convert_to_native_format(cls, **kwargs) -> dict[str, Any]:
        return kwargs  # __init__ reads the files itself

    def _backend(self, vocab_file: str | None, tokenizer_file: str | None) -> Tokenizer:
        if tokenizer_file:
            backend = Tokenizer.from_file(tokenizer_file)
        else:
            backend = backend_from_sentencepiece(vocab_file, self.generation)
        special = not self.encode_special_tokens
        backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in self.roles.values()])
        # The backend goes on treating a token as special until it is loaded anew.
        return backend if special else Tokenizer.from_str(backend.to_str())

    def update_post_processor(self):
        prefix = " ".join(f"{token}:0" for token in PREFIX)
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A:0",
            pair=f"{prefix} $A:0 $B:0 </s>:0",
            special_tokens=[(token, self._tokenizer.token_to_id(token)) for token in [*PREFIX, "</s>"]],
        )

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end a reply: </s>, and for ChatGLM3 the token of whoever speaks next."""
        names = [self.roles[role] for role in ("user", "observation") if role in self.roles]
        return [self.eos_token_id, *self.convert_tokens_to_ids(names)]

    @property
    def end_of_reply_token_id(self) -> int:
        return self.eos_token_id

    def _convert_encoding(self, encoding, *args, **kwargs):
        columns, encodings = super()._convert_encoding(encoding, *args, **kwargs)
        if "position_ids" in self.model_input_names:
            columns["position_ids"] = [position_ids_of(each.attention_mask) for each in encodings]
        return columns, encodings

    def _pad(self, encoded_inputs, *args, padding_side: str | None = None, **kwargs):
        real = len(encoded_inputs["input_ids"])
        if "position_ids" in self.model_input_names and "position_ids" not in encoded_inputs:
            encoded_inputs["position_ids"] = position_ids_of(encoded_inputs.get("attention_mask", [1] * real))
        encoded = super()._pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)
        zeros = [0] * (len(encoded["input_ids"]) - real)
        for column in {"position_ids", "assistant_masks"} & set(encoded):
            left = (padding_side or self.padding_side) == "left"
            encoded[column] = zeros + encoded[column] if left else encoded[column] + zeros
        return encoded

    def _decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str:
        # ChatGLM2 never shows special tokens, ChatGLM3 does unless told otherwise.
        skip_special_tokens = skip_special_tokens or self.generation in SECOND_GENERATION
        return super()._decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return files + self.save_vocabulary(save_directory, filename_prefix) if self.can_save_slow_tokenizer else files

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        tools: list | None = None,
        documents: list[dict] | None = None,
        chat_template: str | None = None,
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
        **kwargs,
    ):
        """The published prompt of one conversation or a batch of them, every part encoded on its own.

        Messages are dicts of `role` and `content`, with ChatGLM3 also `metadata`, and `tools` in the system message.
        No end token is appended. With `return_assistant_tokens_mask`, `assistant_masks` marks what a model should
        learn: with ChatGLM3 each assistant message and the role token after it, with ChatGLM2 the final reply;
        a message's own `loss` key (true or false) takes precedence. Raises ValueError for an unknown role.
        """
        tokenizer_kwargs = tokenizer_kwargs or {}
        if (chat_template or self.chat_template) != CHAT_TEMPLATES[self.generation]:
            return super().apply_chat_template(
                conversation,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=tokenize,
                padding=padding,
                truncation=truncation,
                max_length=max_length,
                return_tensors=return_tensors,
                return_dict=return_dict,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                tokenizer_kwargs={"split_special_tokens": False, **tokenizer_kwargs},
                **kwargs,
            )
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "Choose one of continue_final_message and add_generation_prompt: the reply is open or new."
            )

        batched = len(conversation) > 0 and not isinstance(conversation[0], dict)
        conversations = conversation if batched else [conversation]
        prompts = [self._prompt(messages, tools, add_generation_prompt) for messages in conversations]
        if not tokenize:
            texts = [text_of(parts) for parts in prompts]
            return texts if batched else texts[0]

        columns = self._encode_prompts(prompts)
        if not return_assistant_tokens_mask:
            del columns["assistant_masks"]
        if truncation:
            limit = max_length or self.model_max_length
            kept = slice(-limit, None) if self.truncation_side == "left" else slice(limit)
            columns = {name: [row[kept] for row in rows] for name, rows in columns.items()}
        encoding = self.pad(
            columns, padding=padding, max_length=max_length, return_tensors=return_tensors, **tokenizer_kwargs
        )
        if not batched and return_tensors is None:
            encoding = BatchEncoding({name: rows[0] for name, rows in encoding.items()})
        return encoding if return_dict else encoding["input_ids"]

    def _prompt(self, messages: list[dict], tools: list | None, cue: bool) -> list[Part]:
        if not messages:
            raise ValueError("A conversation needs at least one message.")
        known = self.roles or ("system", "user", "assistant")
        messages = [{**message, "content": message.get("content") or ""} for message in messages]
        for message in messages:
            if message.get("role") not in known:
                raise ValueError(f"Unknown role {message.get('role')!r}: {self.generation} knows {', '.join(known)}.")
            if not isinstance(message["content"], str):
                raise ValueError(
                    f"The content of a {message['role']} message must be text, got {message['content']!r}."
                )
        if not self.roles and (tools or messages[0].get("tools")):
            raise ValueError(f"{self.generation} has no prompt for tools; leave them out or use ChatGLM3.")
        tools = [get_json_schema(tool) if callable(tool) else tool for tool in tools or []]
        parts = role_parts(messages, tools, cue, self.roles) if self.roles else round_parts(messages, cue)
        return [*(Part(token, special=True) for token in PREFIX), *parts]

    def _encode_prompts(self, prompts: list[list[Part]]) -> dict[str, list[list[int]]]:
        """Ids and training masks of all prompts, with all their texts in one call of the backend."""
        backend = self._tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # that is, as text
        texts = [part.text for parts in prompts for part in parts if not part.special]
        encodings = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
        input_ids, masks = [], []
        for parts in prompts:
            ids, mask = [], []
            for part in parts:
                part_ids = [backend.token_to_id(part.text)] if part.special else next(encodings).ids
                ids += part_ids
                mask += [int(part.trained)] * len(part_ids)
            input_ids.append(ids)
            masks.append(mask)
        return {"input_ids": input_ids, "assistant_masks": masks}
