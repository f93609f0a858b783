"""Tokenizer of ChatGLM2-6B, ChatGLM3-6B and CodeGeeX2-6B, with their published prompts as chat template."""

import json
from collections.abc import Iterator
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from transformers.utils import cached_file

from .configuration_chatglm import SECOND_GENERATION, generation_of
from .sentencepiece_files import KINDS, cuts_of, names_not_in_text, normalizers_of, read_model, unigram_pieces
from .tokenization_chatglm_6b import VOCAB_FILES_NAMES as FIRST_VOCAB_FILES_NAMES
from .tokenization_chatglm_6b import ChatGLM6BTokenizer
from .tokenization_parts import (
    ROLE_TOKENS,
    TRIMMED_ANSWERS,
    Part,
    PartsTokenizer,
    config_beside,
    is_trained,
    new_tokens,
    turns_of,
)


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
FIRST_VOCABULARY = FIRST_VOCAB_FILES_NAMES["vocab_file"]
NOT_FOUND_IS_NONE = {
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
PREFIX = ["[gMASK]", "sop"]  # opens every sequence
APPENDED = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]  # ids after the SentencePiece vocabulary, in this order
ROLES = {
    "chatglm2": {},
    "codegeex2": {},
    "chatglm3": ROLE_TOKENS,
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


CHAT_TEMPLATES = {generation: ROLES_TEMPLATE if ROLES[generation] else ROUNDS_TEMPLATE for generation in ROLES}


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The BPE merges behind SentencePiece's scores: every split of a piece into two pieces, best piece first."""
    merges = []
    for piece in sorted(scores, key=scores.get, reverse=True):
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(left, right) for left, right in splits if left in scores and right in scores]
    return merges


def bpe_model(proto, appended: list[str]) -> BPE:
    """The BPE model of a SentencePiece file, with `appended` tokens behind its pieces."""
    kinds = proto.SentencePiece
    not_in_text = (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE)
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type not in not_in_text}
    names = [*(piece.piece for piece in proto.pieces), *appended]
    vocabulary = {name: index for index, name in enumerate(names)}
    return BPE(vocabulary, merges_of(scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def backend_from_sentencepiece(vocab_file: str, generation: str) -> Tokenizer:
    """A tokenizer.model, followed by the special tokens of the generation, as a `tokenizers` backend.

    The published files are BPE; vocabularies of people's own may be unigram.
    """
    proto = read_model(vocab_file, ("bpe", "unigram"))
    kinds = proto.SentencePiece
    named = [piece.piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    appended = [*APPENDED, *ROLES[generation].values()]
    if KINDS[proto.trainer_spec.model_type] == "bpe":
        backend = Tokenizer(bpe_model(proto, appended))
    else:  # which finds all its pieces in text: the appended tokens follow below, beside the model
        fallback = any(piece.type == kinds.BYTE for piece in proto.pieces)
        backend = Tokenizer(Unigram(unigram_pieces(proto), proto.trainer_spec.unk_id, byte_fallback=fallback))
        cuts = cuts_of(names_not_in_text(proto), SentencePieceProcessor(model_proto=proto.SerializeToString()))
        backend.pre_tokenizer = pre_tokenizers.Split(cuts, "merged_with_previous")
    backend.normalizer = normalizers.Sequence(normalizers_of(proto.normalizer_spec))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # Programs that load tokenizer.json alone look for these in text: "sop" must not be found inside "philosophy".
    for token in [*named, *appended]:
        word = token.isalpha()
        backend.add_special_tokens([AddedToken(token, single_word=word, rstrip=word, normalized=False, special=True)])
    return backend


def role_parts(messages: list[dict], tools: list | None, cue: bool, roles: dict[str, str]) -> Iterator[Part]:
    """ChatGLM3: role token, metadata and newline, content; a reply is ended by the next role token."""
    if tools and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": TOOLS_PROMPT}, *messages]
    trained = False
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "system" and (functions := message.get("tools") or (tools if index == 0 else None)):
            content += "\n" + json.dumps(functions, indent=4, ensure_ascii=False)
        yield Part(roles[message["role"]], trained, special=True)
        trained = is_trained(message)
        yield Part((message.get("metadata") or "") + "\n", trained)
        yield Part(content, trained)
    if cue:
        yield Part(roles["assistant"], trained, special=True)


def round_parts(messages: list[dict], cue: bool) -> Iterator[Part]:
    """ChatGLM2: all rounds up to the last 答： as one text, then the final reply."""
    text = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    messages = turns_of(messages, "ChatGLM2")
    for index, message in enumerate(messages):
        last = index == len(messages) - 1
        if message["role"] == "user":
            text += f"[Round {index // 2 + 1}]\n\n问：{message['content']}" + ("" if last and not cue else "\n\n答：")
        elif not last:
            text += message["content"] + "\n\n"
    yield Part(text)
    if messages and messages[-1]["role"] == "assistant":
        yield Part(messages[-1]["content"], is_trained(messages[-1]))


class ChatGLMTokenizer(PartsTokenizer):
    """Fast tokenizer over the published tokenizer.model.

    Special tokens written out in a text stay text, except those that the user has added, and that ChatGLM3's
    `encode_special_tokens=True` finds the four role tokens. `generation` ("chatglm2", "codegeex2", "chatglm3") is read
    from the config.json beside the vocabulary where it is not given. Raises ValueError without a vocabulary file.
    """

    prefix = PREFIX
    end_of_pair = "</s>"
    tools_prompt = TOOLS_PROMPT

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """The tokenizer of a folder or hub name: ChatGLM-6B's, which published the same class name, by its file."""
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        first = cached_file(pretrained_model_name_or_path, FIRST_VOCABULARY, **options, **NOT_FOUND_IS_NONE)
        tokenizer_class = super() if first is None else ChatGLM6BTokenizer
        return tokenizer_class.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        generation: str | None = None,
        encode_special_tokens: bool = False,
        **kwargs,
    ):
        if vocab_file is None and tokenizer_file is None:
            raise ValueError(
                "ChatGLMTokenizer found no tokenizer.model (of ChatGLM-6B: ice_text.model); copy the published one "
                "into the folder."
            )
        if generation is None:  # a published folder, whose template (if any) knows neither tools nor metadata
            generation = generation_of(config_beside(vocab_file), kwargs.get("name_or_path", ""))
            generation = generation if generation in ROLES else "chatglm3"  # whose vocabulary file this is not GLM-4's
            kwargs.pop("chat_template", None)
        self.generation = generation
        self.roles = ROLES[generation]
        self.encode_special_tokens = encode_special_tokens
        self._tokenizer = self._backend(vocab_file, tokenizer_file)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._published = {token.content for token in added if token.special}

        kwargs["added_tokens_decoder"] = new_tokens(kwargs.get("added_tokens_decoder", {}), self._tokenizer)
        kwargs.pop("split_special_tokens", None)
        for name, token in (("unk_token", "<unk>"), ("pad_token", "<unk>"), ("eos_token", "</s>")):
            kwargs.setdefault(name, token)
        kwargs.setdefault("chat_template", CHAT_TEMPLATES[generation])
        super().__init__(
            vocab_file=vocab_file, generation=generation, encode_special_tokens=encode_special_tokens, **kwargs
        )
        # Special tokens in text stay text. Not saved: whoever loads tokenizer.json alone needs them to be found.
        self.split_special_tokens = True

    def _backend(self, vocab_file: str | None, tokenizer_file: str | None) -> Tokenizer:
        if tokenizer_file:
            backend = Tokenizer.from_file(tokenizer_file)
        else:
            backend = backend_from_sentencepiece(vocab_file, self.generation)
        special = not self.encode_special_tokens
        backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in self.roles.values()])
        # The backend goes on treating a token as special until it is loaded anew.
        return backend if special else Tokenizer.from_str(backend.to_str())

    def _add_tokens(self, new_tokens: list[str | AddedToken], special_tokens: bool = False) -> int:
        if not special_tokens:
            return super()._add_tokens(new_tokens)
        # A special token of the user's own is found in text, unlike the published ones: the backend takes it for an
        # ordinary one, and `_decode` hides it.
        published = [token for token in new_tokens if str(token) in self._published]
        own = [token for token in new_tokens if str(token) not in self._published]
        own = [AddedToken(token, normalized=False) if isinstance(token, str) else token for token in own]
        own = [AddedToken(**{**token.__getstate__(), "special": False}) for token in own]
        return super()._add_tokens(published, special_tokens=True) + super()._add_tokens(own)

    def _decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str:
        # ChatGLM2 never shows special tokens, ChatGLM3 does unless told otherwise.
        skip_special_tokens = skip_special_tokens or self.generation in SECOND_GENERATION
        if skip_special_tokens:
            hidden = set(self.all_special_ids)
            ids = [token_ids] if isinstance(token_ids, int) else token_ids
            token_ids = [index for index in ids if index not in hidden]
        return super()._decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def _call_text(self, arguments: dict[str, Any]) -> str:
        called = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        return f"```python\ntool_call({called})\n```"

    def _own_prompt(self, template: str) -> bool:
        return template.removeprefix(TRIMMED_ANSWERS) == CHAT_TEMPLATES[self.generation]

    def _parts(self, messages: list[dict], tools: list, cue: bool, template: str) -> list[Part]:
        if self.roles:
            return list(role_parts(messages, tools, cue, self.roles))
        if tools or messages[0].get("tools"):
            raise ValueError(f"{self.generation} has no prompt for tools; leave them out or use ChatGLM3.")
        return list(round_parts(messages, cue))

    def _text_of(self, parts: list[Part]) -> str:
        text = ""
        for previous, part in zip([None, *parts[:-1]], parts, strict=True):
            follows_role = previous is None or (previous.special and previous.text not in PREFIX)
            text += part.text if part.special or follows_role or not part.text else " " + part.text
        return text

    def continuation_of_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        if self.roles:
            return super().continuation_of_chat(messages)
        round_number = sum(message["role"] == "user" for message in messages)
        text = f"\n\n[Round {round_number}]\n\n问：{messages[-1]['content']}\n\n答："
        return self.encode(text, add_special_tokens=False)[1:]  # without the blank that opens every text
