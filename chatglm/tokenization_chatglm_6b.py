"""Tokenizer of the first ChatGLM-6B, with its published prompt as chat template."""

import os
import shutil

import numpy as np
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from transformers.utils import PaddingStrategy

from .sentencepiece_files import cuts_of, names_not_in_text, normalizers_of, read_model, unigram_pieces
from .tokenization_parts import Part, PartsTokenizer, config_beside, is_trained, new_tokens, turns_of


VOCAB_FILES_NAMES = {"vocab_file": "ice_text.model", "tokenizer_file": "tokenizer.json"}
SUFFIX = ["[gMASK]", "<sop>"]  # closes every prompt
SPECIAL = {"bos": "<sop>", "eos": "<eop>", "mask": "[MASK]", "pad": "<pad>", "unk": "<unk>"}  # found in text
LONGEST_BLANK = 80
WHITESPACE = {"\n": "<n>", "\t": "<|tab|>"} | {" " * size: f"<|blank_{size}|>" for size in range(LONGEST_BLANK, 1, -1)}
PUBLISHED_IMAGE_TOKENS = 20000
UNKNOWN_SURFACE = "\ue000"  # a private character that stands for <unk> until the text is put together

CHAT_TEMPLATE = """\
{%- set rounds = messages | selectattr('role', 'equalto', 'user') | list | length > 1 -%}
{%- set state = namespace(round=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' and loop.first -%}
{{- message['content'] + '\\n' -}}
{%- elif message['role'] == 'user' -%}
{%- if rounds -%}{{- '[Round ' ~ state.round ~ ']\\n问：' -}}{%- endif -%}
{{- message['content'] -}}
{%- if rounds and (add_generation_prompt or not loop.last) -%}{{- '\\n答：' -}}{%- endif -%}
{%- set state.round = state.round + 1 -%}
{%- elif message['role'] == 'assistant' -%}
{%- if not loop.last -%}{{- message['content'] + '\\n' -}}{%- endif -%}
{%- else -%}
{{- raise_exception('This model has no role ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{{- '[gMASK]<sop>' -}}
{%- if messages[-1]['role'] == 'assistant' -%}{{- messages[-1]['content'] -}}{%- endif -%}"""


def backend_from_sentencepiece(vocab_file: str, num_image_tokens: int) -> Tokenizer:
    """The published ice_text.model after `num_image_tokens` <image_N> tokens, as a `tokenizers` backend."""
    proto = read_model(vocab_file, ("unigram",))
    pieces = unigram_pieces(proto)
    worst = min(score for _, score in pieces)
    vocabulary = [(f"<image_{index}>", worst) for index in range(num_image_tokens)] + pieces
    named = names_not_in_text(proto)
    named += [f"<image_{index}>" for index in range(min(num_image_tokens, 10))]  # their digits are all cut alike

    backend = Tokenizer(Unigram(vocabulary, unk_id=num_image_tokens + proto.trainer_spec.unk_id, byte_fallback=True))
    blanks = [normalizers.Replace(text, token) for text, token in WHITESPACE.items()]
    backend.normalizer = normalizers.Sequence([*blanks, *normalizers_of(proto.normalizer_spec)])
    cuts = cuts_of(named, SentencePieceProcessor(model_proto=proto.SerializeToString()))
    backend.pre_tokenizer = pre_tokenizers.Split(cuts, "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPECIAL["unk"], UNKNOWN_SURFACE),
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(Regex("^ +"), ""),
        ]
    )
    # The published tokenizer takes the blanks beside a special token with it.
    backend.add_special_tokens(
        [AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=True) for token in SPECIAL.values()]
    )
    return backend


def image_tokens_beside(vocab_file: str) -> int:
    """How many ids come before the vocabulary, by the config.json beside it; the published default without one."""
    bos_token_id = config_beside(vocab_file).get("bos_token_id")
    if bos_token_id is None:
        return PUBLISHED_IMAGE_TOKENS
    return max(0, bos_token_id - SentencePieceProcessor(model_file=vocab_file).piece_to_id(SPECIAL["bos"]))


def rounds_of(questions: list[str], replies: list[str], cue: bool) -> str:
    """The published prompt: the question alone, or numbered rounds where others came before it."""
    if len(questions) == 1:
        return questions[0]
    text = "".join(
        f"[Round {index}]\n问：{question}\n答：{reply}\n"
        for index, (question, reply) in enumerate(zip(questions[:-1], replies, strict=True))
    )
    return text + f"[Round {len(questions) - 1}]\n问：{questions[-1]}" + ("\n答：" if cue else "")


class ChatGLM6BTokenizer(PartsTokenizer):
    """Fast tokenizer over the published ice_text.model: ids + [gMASK, <sop>], pairs a + [gMASK, <sop>] + b + [<eop>].

    As published, a call without padding returns input_ids alone, and one with padding also attention_mask
    [B, 1, S, S], True = hidden, and position_ids [B, 2, S]. `return_attention_mask=True` gives the ordinary mask
    [B, S], 1 = real token, instead; so do `apply_chat_template`, and `pad` where the rows bring such a mask along.
    The model and its `generate` take either.

    <sop>, <eop>, [MASK], <pad> and <unk> written in a text are found there by a plain call, never by
    `apply_chat_template`. `num_image_tokens` ids come before those of the vocabulary; where it is not given,
    the config.json beside the vocabulary says how many. Raises ValueError without a vocabulary file.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    counts_positions = False
    generation = "ChatGLM-6B"
    roles = {}
    suffix = SUFFIX
    end_of_pair = SPECIAL["eos"]

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        num_image_tokens: int | None = None,
        gmask_token: str = "[gMASK]",
        end_token: str = "</s>",
        **kwargs,
    ):
        if vocab_file is None and tokenizer_file is None:
            raise ValueError("ChatGLM6BTokenizer found no ice_text.model; copy the published one into the folder.")
        if num_image_tokens is None:
            num_image_tokens = image_tokens_beside(vocab_file or tokenizer_file)
        if tokenizer_file:
            self._tokenizer = Tokenizer.from_file(tokenizer_file)
        else:
            self._tokenizer = backend_from_sentencepiece(vocab_file, num_image_tokens)
        self.gmask_token, self.end_token = str(gmask_token), str(end_token)

        kwargs["added_tokens_decoder"] = new_tokens(kwargs.get("added_tokens_decoder", {}), self._tokenizer)
        kwargs.pop("model_specific_special_tokens", None)  # the library would look for these in texts
        for name, token in SPECIAL.items():
            kwargs.setdefault(f"{name}_token", token)
        kwargs.setdefault("chat_template", CHAT_TEMPLATE)
        kwargs.setdefault("clean_up_tokenization_spaces", True)
        super().__init__(vocab_file=vocab_file, num_image_tokens=num_image_tokens, **kwargs)
        self.init_kwargs.update(gmask_token=self.gmask_token, end_token=self.end_token)

    def _add_tokens(self, new_tokens: list[str | AddedToken], special_tokens: bool = False) -> int:
        # Looked for in the text as written: normalising would put the leading blank before each of them.
        tokens = []
        for token in new_tokens:
            token = token if isinstance(token, AddedToken) else AddedToken(token)
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")}
            tokens.append(AddedToken(token.content, **flags, normalized=False))
        return super()._add_tokens(tokens, special_tokens)

    @property
    def gmask_token_id(self) -> int:
        return self.convert_tokens_to_ids(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        return self.convert_tokens_to_ids(self.end_token)

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs) -> list[str]:
        # The backend's own would show special tokens with the blanks that they took along.
        encoding = self._encode_plus(text=text, text_pair=pair, add_special_tokens=add_special_tokens, **kwargs)
        return self.convert_ids_to_tokens(encoding["input_ids"])

    # --- padding

    def prefix_mask_and_positions(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The published mask [1, S, S], True = hidden, and positions [2, S] of an unpadded row.

        Where a row holds both masks, [MASK] comes before [gMASK] here; in the model it is the other way round.
        """
        length = len(ids)
        context_length = ids.index(self.bos_token_id) if self.bos_token_id in ids else length
        hidden = np.triu(np.ones((1, length, length), dtype=bool), k=1)
        hidden[:, :, :context_length] = False
        positions = np.zeros((2, length), dtype=np.int64)
        positions[0] = np.arange(length)
        positions[1, context_length:] = np.arange(1, length - context_length + 1)
        filled = self.mask_token_id if self.mask_token_id in ids else self.gmask_token_id
        if filled in ids:
            positions[0, context_length:] = ids.index(filled)
        return hidden, positions

    def _convert_encoding(self, encoding, return_token_type_ids=None, return_attention_mask=None, **kwargs):
        columns, encodings = super()._convert_encoding(
            encoding, return_token_type_ids, return_attention_mask=bool(return_attention_mask), **kwargs
        )
        if return_attention_mask is None and self._tokenizer.padding is not None:
            for each in encodings:
                real = np.flatnonzero(each.attention_mask)
                mask, positions = self.prefix_mask_and_positions([each.ids[index] for index in real])
                left = int(real[0]) if len(real) else 0
                margin = (left, len(each.ids) - left - len(real))
                columns["attention_mask"].append(np.pad(mask, ((0, 0), margin, margin), constant_values=True).tolist())
                columns["position_ids"].append(np.pad(positions, ((0, 0), margin)).tolist())
        return columns, encodings

    def _pad(
        self,
        encoded_inputs,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        return_attention_mask: bool | None = None,
        padding_side: str | None = None,
        **options,
    ) -> dict:
        encoded = dict(encoded_inputs)
        mask, length = encoded.get("attention_mask"), len(encoded["input_ids"])
        ordinary = bool(return_attention_mask) or (mask is not None and np.ndim(mask) == 1)
        published = return_attention_mask is None and not ordinary and padding_strategy != PaddingStrategy.DO_NOT_PAD
        if published:
            if mask is None:
                encoded["attention_mask"], encoded["position_ids"] = self.prefix_mask_and_positions(
                    list(encoded["input_ids"])
                )
            mask, positions = np.array(encoded.pop("attention_mask")), np.array(encoded.pop("position_ids"))
        encoded = super()._pad(
            encoded,
            padding_side=padding_side,
            padding_strategy=padding_strategy,
            return_attention_mask=ordinary,
            **options,
        )
        if published:
            added = len(encoded["input_ids"]) - length
            margin = (added, 0) if (padding_side or self.padding_side) == "left" else (0, added)
            encoded["attention_mask"] = np.pad(mask, ((0, 0), margin, margin), constant_values=True).tolist()
            encoded["position_ids"] = np.pad(positions, ((0, 0), margin)).tolist()
        return encoded

    # --- decoding and saving

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        silent = {self.pad_token_id, *self._control_ids()}
        if skip_special_tokens:
            silent |= set(self.all_special_ids)
        text = self._tokenizer.decode([index for index in ids if index not in silent], skip_special_tokens=False)
        for blank, token in WHITESPACE.items():
            text = text.replace(token, blank)
        text = text.replace(UNKNOWN_SURFACE, " ⁇ ")
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def _control_ids(self) -> list[int]:
        """Ids that never show in text, with or without skip_special_tokens."""
        names = ["<s>", "</s>", "<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"]
        return [self._tokenizer.token_to_id(name) for name in [*names, "<ENC>", "<dBLOCK>"]]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copies ice_text.model, whose name the library does not know, where the tokenizer was made from it."""
        if not self.can_save_slow_tokenizer:
            return ()
        name = VOCAB_FILES_NAMES["vocab_file"]
        path = os.path.join(save_directory, f"{filename_prefix}-{name}" if filename_prefix else name)
        if os.path.abspath(self.vocab_file) != os.path.abspath(path):
            shutil.copyfile(self.vocab_file, path)
        return (path,)

    # --- chat

    def _own_prompt(self, template: str) -> bool:
        return template == CHAT_TEMPLATE

    def _parts(self, messages: list[dict], tools: list, cue: bool, template: str) -> list[Part]:
        """The prompt, which [gMASK] and <sop> close, and the final reply where there is one."""
        if tools:
            raise ValueError("ChatGLM-6B has no prompt for tools; leave them out or use ChatGLM3.")
        turns = turns_of(messages, self.generation)
        if not turns:
            raise ValueError("A conversation needs at least one user message.")
        contents = [message["content"] for message in turns]
        questions, replies = contents[0::2], contents[1::2]
        answered = len(questions) == len(replies)
        text = rounds_of(questions, replies[: len(questions) - 1], cue or answered)
        if len(turns) < len(messages):
            text = messages[0]["content"] + "\n" + text
        reply = [Part(replies[-1], is_trained(messages[-1]))] if answered else []
        return [Part(text), *(Part(token, special=True) for token in self.suffix), *reply]
