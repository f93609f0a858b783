"""SentencePiece models as parts of a `tokenizers` backend: what a file declares is kept, or refused by name.

Fields: sentencepiece_model.proto of SentencePiece.
"""

import re
from collections import defaultdict

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import Regex, normalizers


KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # trainer_spec.model_type
NORMALIZATIONS = ("identity", "nmt_nfkc")


def read_model(vocab_file: str, kinds: tuple[str, ...]) -> sentencepiece_model_pb2.ModelProto:
    """The model in a file. Raises ValueError for a file that holds none, or another kind or normalisation."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        with open(vocab_file, "rb") as file:
            proto.ParseFromString(file.read())
    except DecodeError:
        proto.Clear()
    if not proto.pieces or not proto.HasField("trainer_spec"):  # which stands behind the pieces
        raise ValueError(f"{vocab_file} is empty, cut off or no SentencePiece model: copy the published file anew.")
    kind = KINDS[proto.trainer_spec.model_type]
    if kind not in kinds:
        raise ValueError(f"{vocab_file} is a SentencePiece model of the kind {kind}; {' or '.join(kinds)} is needed.")
    spec = proto.normalizer_spec
    other = spec.name not in NORMALIZATIONS and spec.precompiled_charsmap
    if other or not spec.escape_whitespaces or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(
            f"{vocab_file} normalises text by {spec.name!r} or treats blanks in an unknown way: known are "
            f"{', '.join(NORMALIZATIONS)}, with blanks before words."
        )
    return proto


def normalizers_of(spec) -> list[normalizers.Normalizer]:
    """The steps of a normalizer_spec."""
    steps = []
    if spec.precompiled_charsmap:
        steps += [
            # Precompiled loses what follows a mapped character in one grapheme, as the joiner in "½\u200d". A control
            # character keeps the two apart, and Precompiled removes it.
            normalizers.Replace(Regex(r"(?<=[^\x00-\x7f])(?=[\p{M}\u200d\uff9e\uff9f])"), "\x01"),
            normalizers.Precompiled(spec.precompiled_charsmap),
            normalizers.NFC(),  # Precompiled leaves long graphemes in parts, as half-width ガ
        ]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), "▁")]
    else:
        steps.append(normalizers.Replace(" ", "▁"))
    if spec.add_dummy_prefix:  # not Metaspace: it leaves out the leading blank where the text begins with one
        steps.append(normalizers.Prepend("▁"))
    return steps


def unigram_pieces(proto) -> list[tuple[str, float]]:
    """The pieces with their scores, those that are not found in text with the worst."""
    kinds = proto.SentencePiece
    scores = [piece.score for piece in proto.pieces if piece.type == kinds.NORMAL]
    pieces = []
    for piece in proto.pieces:
        if piece.type == kinds.USER_DEFINED:  # SentencePiece's bonus, by which it always chooses these
            pieces.append((piece.piece, len(piece.piece) * max(scores) - 0.1))
        else:
            pieces.append((piece.piece, piece.score if piece.type == kinds.NORMAL else min(scores)))
    return pieces


def names_not_in_text(proto) -> list[str]:
    kinds = proto.SentencePiece
    return [piece.piece for piece in proto.pieces if piece.type not in (kinds.NORMAL, kinds.USER_DEFINED)]


def cuts_of(names: list[str], model: SentencePieceProcessor) -> Regex:
    """Where to cut the names of pieces that must not be found in text: after the piece that SentencePiece begins with.

    A Unigram backend finds all its pieces, but SentencePiece only those of text and the user's symbols.
    """
    tails = defaultdict(set)
    for name in names:
        pieces = (piece.removeprefix("▁") for piece in model.encode(name, out_type=str))
        first = next(piece for piece in pieces if piece)
        cut = len(first) if name.startswith(first) and first != name else 1  # 1: a byte piece, of one character
        tails[name[:cut]].add(re.sub(r"^(.*image_)\d+>$", r"\1\\d+>", re.escape(name[cut:])))
    heads = (f"{re.escape(head)}(?={'|'.join(sorted(ends))})" for head, ends in tails.items())
    return Regex("|".join(heads))
