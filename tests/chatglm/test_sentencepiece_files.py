"""Vocabularies that people trained themselves: ids equal to SentencePiece's, whatever the file declares."""

import random
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from chatglm import ChatGLM6BTokenizer, ChatGLMTokenizer


LINES = [f"茶馆里的第{n}位客人 says hello to number {n * 37 % 101}, 一壶龙井{n}元。" for n in range(300)]
ALPHABET = [
    *"茶馆里的客人龙井一壶元abchelosay 19.,。 　Ａｂ①½é\u0301ガｶﾞ😀",
    "  ",
    "<s>",
    "<0x41>",
    "<unk>",
    "[gMASK]",
    "sop",
    "hello",
]


def trained(folder, **options):
    options = {"vocab_size": 420, "byte_fallback": True, "minloglevel": 2, **options}
    SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_prefix=str(folder / "tokenizer"), **options)
    return str(folder / "tokenizer.model")


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"model_type": "unigram", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"model_type": "unigram", "add_dummy_prefix": False},
        {"model_type": "bpe", "vocab_size": 520},
        {"model_type": "bpe", "vocab_size": 520, "add_dummy_prefix": False},
    ],
    ids=["unigram", "unigram-identity", "unigram-no-prefix", "bpe", "bpe-no-prefix"],
)
def test_ids_are_those_of_sentencepiece(tmp_path, options):
    path = trained(tmp_path, **options)
    model, tokenizer = SentencePieceProcessor(model_file=path), ChatGLMTokenizer(path, generation="chatglm2")
    draw = random.Random(0)
    texts = LINES[:20] + ["".join(draw.choices(ALPHABET, k=draw.randint(1, 12))) for _ in range(300)]
    texts = [text for text in texts if model.encode(text)]
    different = [text for text in texts if tokenizer.encode(text, add_special_tokens=False) != model.encode(text)]
    assert different == []
    assert tokenizer.convert_tokens_to_ids("[gMASK]") == len(model) + 1


def test_kind_and_normalisation_that_cannot_be_kept_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="of the kind word; bpe or unigram is needed"):
        ChatGLMTokenizer(trained(tmp_path, model_type="word", byte_fallback=False, hard_vocab_limit=False))
    with pytest.raises(ValueError, match="of the kind bpe; unigram is needed"):
        ChatGLM6BTokenizer(trained(tmp_path, model_type="bpe", vocab_size=520), num_image_tokens=0)
    with pytest.raises(ValueError, match="normalises text by 'nfkc'"):
        ChatGLMTokenizer(trained(tmp_path, normalization_rule_name="nfkc"))


def test_file_that_is_damaged_or_none_is_named(tmp_path):
    path = Path(trained(tmp_path))
    whole = path.read_bytes()
    behind_a_piece = 2 + whole[1]  # each stands behind its key and its length
    for content in (b"", whole[:-1], whole[:behind_a_piece], whole[: len(whole) // 2], b"<!DOCTYPE html>", bytes(99)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.model is empty, cut off or no SentencePiece model"):
            ChatGLMTokenizer(str(path))
