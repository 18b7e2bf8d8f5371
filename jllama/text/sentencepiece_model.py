"""Reads and extends the file of a SentencePiece model: pieces with scores, and normalisation.

The file is a protocol buffer, sentencepiece_model.proto. The module for it in sentencepiece needs a
newer protobuf than other packages allow, and would not keep the bytes of a file that is extended.
"""

import dataclasses
import enum
import struct
from collections.abc import Iterable, Iterator
from typing import Any


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
    for number, value in _fields(model):
        match number:
            case 1:
                piece = {2: b"\0\0\0\0", 3: PieceType.NORMAL, **dict(_fields(value))}
                score = struct.unpack("<f", piece[2])[0]
                pieces.append(Piece(piece[1].decode(), score, PieceType(piece[3])))
            case 2:
                trainer |= _fields(value)
            case 3:
                normalizer |= _fields(value)
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
    fields = list(_fields(model))
    ids = [piece for number, piece in fields if number == 1]
    texts = {dict(_fields(piece))[1].decode(): id for id, piece in enumerate(ids)}
    parts = [_field(number, value) for number, value in fields if number != _SELF_TEST]
    for piece in pieces:
        texts[piece.text] = len(texts)
        score, type = struct.pack("<f", piece.score), _varint(piece.type)
        parts.append(_field(1, _field(1, piece.text.encode()) + b"\x15" + score + b"\x18" + type))
    trainer = b"\x20" + _varint(len(texts))  # vocab_size
    if pad:
        trainer += b"\xd8\x02" + _varint(texts[pad]) + _field(48, pad.encode())  # pad_id, pad_piece
    return b"".join([*parts, _field(2, trainer)])


def _field(number: int, value: bytes) -> bytes:
    return _varint(number * 8 + 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = []
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of a message's fields; a value is an int or the field's bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value - (1 << 64) if value >> 63 else value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or varint()
        yield number, message[at : at + size]
        at += size
