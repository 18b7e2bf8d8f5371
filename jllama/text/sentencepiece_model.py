"""Reads and extends the file of a SentencePiece model: pieces with scores, and normalisation.

The file is a protocol buffer, sentencepiece_model.proto. The module for it in sentencepiece needs a
newer protobuf than other packages allow, and would not keep the bytes of a file that is extended.
"""

import dataclasses
import enum
import struct
from collections.abc import Iterable

from jllama.files import protobuf


class PieceType(enum.IntEnum):
    """The type of a piece, with its number in the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its index is its id."""

    text: str
    score: float
    type: PieceType


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a model's file that decide the ids of a text.

    Attributes:
      algorithm: "unigram", "bpe", "word" or "char".
      pad_id: the id of the padding, or None.
      add_dummy_prefix: whether a space is put before each text.
      remove_extra_whitespaces: whether spaces at both ends, and repeated ones, are removed.
      marks_before: whether U+2581 marks a space before a word, and not after it.
      charsmap: compiled normalisation rules; if empty, texts are not normalised.
    """

    pieces: tuple[Piece, ...]
    algorithm: str
    pad_id: int | None
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    marks_before: bool
    charsmap: bytes


def parse_sentencepiece(model: bytes) -> SentencePieceModel:
    """Parses a model that sentencepiece has loaded, so the file is known to be whole."""
    # Fields by their numbers in the .proto, and its defaults.
    pieces, trainer, normalizer = [], {}, {}
    for number, value in protobuf.fields(model):
        match number:
            case 1:
                piece = {2: b"\0\0\0\0", 3: PieceType.NORMAL, **dict(protobuf.fields(value))}
                score = struct.unpack("<f", piece[2])[0]
                pieces.append(Piece(piece[1].decode(), score, PieceType(piece[3])))
            case 2:
                trainer |= protobuf.fields(value)
            case 3:
                normalizer |= protobuf.fields(value)
    pad = trainer.get(43, -1)
    return SentencePieceModel(
        tuple(pieces),
        algorithm={1: "unigram", 2: "bpe", 3: "word", 4: "char"}[trainer.get(3, 1)],
        pad_id=None if pad < 0 else pad,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        marks_before=bool(normalizer.get(5, 1)) and not trainer.get(24, 0),
        charsmap=normalizer.get(2, b""),
    )


_SELF_TEST = 4  # field of sample texts with their pieces, which sentencepiece checks on loading


def append_pieces(model: bytes, pieces: Iterable[Piece], pad: str = "") -> bytes:
    """Returns the model with more pieces; except for samples of encoding, its bytes stay.

    A field that appears twice in a protocol buffer is a list, or its last value counts. So the new
    fields go to the end. `pad` is the text of a control piece that becomes the model's padding.
    """
    fields = list(protobuf.fields(model))
    ids = [piece for number, piece in fields if number == 1]
    texts = {dict(protobuf.fields(piece))[1].decode(): id for id, piece in enumerate(ids)}
    out = [protobuf.bytes_field(number, value) for number, value in fields if number != _SELF_TEST]
    for piece in pieces:
        texts[piece.text] = len(texts)
        text, score = piece.text.encode(), struct.pack("<f", piece.score)
        entry = protobuf.bytes_field(1, text) + protobuf.fixed32_field(2, score)
        entry += protobuf.varint_field(3, piece.type)
        out.append(protobuf.bytes_field(1, entry))
    trainer = protobuf.varint_field(4, len(texts))  # vocab_size
    if pad:
        trainer += protobuf.varint_field(43, texts[pad])  # pad_id
        trainer += protobuf.bytes_field(48, pad.encode())  # pad_piece
    return b"".join([*out, protobuf.bytes_field(2, trainer)])
