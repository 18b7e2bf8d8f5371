"""What a SentencePiece model's file says: pieces with scores, and how texts are normalised.

A protocol buffer, sentencepiece_model.proto. The module that comes with sentencepiece reads and
writes it too, but asks for a newer protobuf than other packages allow.
"""

import dataclasses
import enum
import struct
from collections.abc import Iterable

from jllama.files import protobuf


class PieceType(enum.IntEnum):
    """As the file numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary; its place is its id."""

    text: str
    score: float
    type: PieceType


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a model's file that decide ids.

    Attributes:
      algorithm: "unigram", "bpe", "word" or "char".
      pad_id: None if there is none.
      add_dummy_prefix: a space is put before each text.
      remove_extra_whitespaces: at both ends, and several in a row.
      marks_before: spaces are marked by U+2581, before a word and not after it.
      charsmap: compiled normalisation rules; empty is the identity.
    """

    pieces: tuple[Piece, ...]
    algorithm: str
    pad_id: int | None
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    marks_before: bool
    charsmap: bytes


def parse_sentencepiece(model: bytes) -> SentencePieceModel:
    """Reads what sentencepiece has loaded before: a file that is damaged otherwise is not told."""
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


_SELF_TEST = 4  # sample texts with their pieces, which sentencepiece checks when it loads a model


def append_pieces(model: bytes, pieces: Iterable[Piece], pad: str = "") -> bytes:
    """The model with more pieces: every other byte of it is kept, but for samples of encoding.

    Fields of a protocol buffer that stand in it twice are lists, or the last one counts: so what is
    new goes to the end. `pad` is the text of a control piece that becomes the model's padding.
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
