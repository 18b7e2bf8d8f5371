"""What a SentencePiece model's file says: pieces with scores, and how texts are normalised.

A protocol buffer, sentencepiece_model.proto. The module that comes with sentencepiece reads and
writes it too, but asks for a newer protobuf than other packages allow.
"""

import dataclasses
import enum
import struct
from collections.abc import Iterable, Iterator
from typing import Any


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


_SELF_TEST = 4  # sample texts with their pieces, which sentencepiece checks when it loads a model


def append_pieces(model: bytes, pieces: Iterable[Piece], pad: str = "") -> bytes:
    """The model with more pieces: every other byte of it is kept, but for samples of encoding.

    Fields of a protocol buffer that stand in it twice are lists, or the last one counts: so what is
    new goes to the end. `pad` is the text of a control piece that becomes the model's padding.
    """
    fields = list(_fields(model))
    ids = [piece for number, piece in fields if number == 1]
    texts = {dict(_fields(piece))[1].decode(): id for id, piece in enumerate(ids)}
    out = [_field(number, value) for number, value in fields if number != _SELF_TEST]
    for piece in pieces:
        texts[piece.text] = len(texts)
        score, type = struct.pack("<f", piece.score), _varint(piece.type)
        out.append(_field(1, _field(1, piece.text.encode()) + b"\x15" + score + b"\x18" + type))
    trainer = b"\x20" + _varint(len(texts))  # vocab_size
    if pad:
        trainer += b"\xd8\x02" + _varint(texts[pad]) + _field(48, pad.encode())  # pad_id, pad_piece
    return b"".join([*out, _field(2, trainer)])


def _field(number: int, value: bytes) -> bytes:
    return _varint(number * 8 + 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = []
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message's fields: int, or the bytes of whatever they are."""
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
