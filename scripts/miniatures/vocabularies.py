"""Vocabularies learnt from a few lines, in the file formats of the published ones."""

import base64
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .releases import SETTLED_IDS


TEXT = """\
[Round 1]\n\n问：你好\n\n答：你好！很高兴见到你，有什么可以帮助你的吗？
今天天气怎么样？今天是晴天，适合出去走走。明天可能会下雨，记得带伞。
请介绍一下你自己。我是一个人工智能助手，可以回答问题、写文章和翻译。
这件上衣采用纯棉面料，柔软舒适，简约的版型显瘦百搭。裙子的图案很特别，适合夏天穿。
小姐，咱们回宫吧，皇上还等着呢。臣妾知道了，多谢姐姐提醒。
北京是中国的首都，上海是最大的城市。一加一等于二，二加二等于四。
Hello, how are you? I am fine, thank you. What is your name? My name is ChatGLM.
The weather is sunny today, so we walk slowly towards the quiet garden with the dog.
def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))
You are a helpful assistant. Follow the instructions of the user and answer in the same language.
"""
SPECIAL_PIECES = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]  # of ChatGLM-6B
WHITESPACE_PIECES = ["<|tab|>", *(f"<|blank_{size}|>" for size in range(2, 81))]


JSON = (".json", ".jsonl")


def strings_in(value: Any) -> Iterator[str]:
    """All strings of a parsed JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def lines_of(paths: list[Path]) -> list[str]:
    """The lines to learn pieces from. Raises ValueError for files that are not what their names say, or hold none."""
    texts = [] if paths else [TEXT]
    for path in paths:
        try:
            content = path.read_text(encoding="utf-8-sig")
            values = [content] if path.suffix == ".json" else filter(str.strip, content.split("\n"))
            texts += strings_in([json.loads(each) for each in values]) if path.suffix in JSON else [content]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--text {path} cannot be read: {error}") from error
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--text {', '.join(map(str, paths))}: there is no text in it to learn from.")
    return lines


def trained_pieces(lines: list[str], vocab_size: int, **options) -> bytes:
    """A tokenizer.model laid out as the published one, at most half of its free ids single characters."""
    counts = Counter(character for line in lines for character in line if not character.isspace())
    common = dict(counts.most_common((vocab_size - SETTLED_IDS) // 2))
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        **options,
    }
    SentencePieceTrainer.train(
        sentence_iterator=("".join(c for c in line if c in common or c.isspace()) for line in lines),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,  # of what is left: rare characters fall back to bytes
        byte_fallback=True,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def first_generation_pieces(lines: list[str], vocab_size: int) -> bytes:
    """An ice_text.model laid out as the published one: text, special tokens, whitespace, bytes."""
    model = sentencepiece_model_pb2.ModelProto()
    options = {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    options |= {"allow_whitespace_only_pieces": False, "pad_id": 3, "user_defined_symbols": ["<n>"]}
    model.ParseFromString(trained_pieces(lines, vocab_size, **options))
    kinds = model.SentencePiece
    pieces = [piece for piece in model.pieces if piece.type != kinds.BYTE]
    pieces += [kinds(piece=piece, score=0.0, type=kinds.CONTROL) for piece in SPECIAL_PIECES]
    pieces += [kinds(piece=piece, score=0.0, type=kinds.USER_DEFINED) for piece in WHITESPACE_PIECES]
    pieces += [piece for piece in model.pieces if piece.type == kinds.BYTE]
    laid_out = sentencepiece_model_pb2.ModelProto(pieces=pieces)
    laid_out.trainer_spec.CopyFrom(model.trainer_spec)
    laid_out.normalizer_spec.CopyFrom(model.normalizer_spec)
    return laid_out.SerializeToString()


def trained_ranks(lines: list[str], vocab_size: int) -> bytes:
    """GLM-4's kind of tokenizer.model: lines of a token's bytes in base64 and its rank."""
    characters = bytes_to_unicode()
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=[*characters.values()], show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    bytes_of = {character: bytes([byte]) for byte, character in characters.items()}
    ranks = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = (b"".join(map(bytes_of.get, token)) for token, _ in ranks)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
