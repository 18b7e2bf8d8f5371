"""Reads and extends the file of a SentencePiece model: pieces with scores, and normalisation.

The file is a protocol buffer. The fields that are needed are declared here after
sentencepiece_model.proto; the others stay as they are. sentencepiece's own module for it is not
used: it asks for a newer protobuf than other packages allow.
"""

import dataclasses
import enum
from collections.abc import Iterable

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

# self_test_data are sample texts with their pieces, which sentencepiece checks on loading.
_PROTO = """
name: "jllama_sentencepiece.proto" package: "jllama" syntax: "proto2"
message_type { name: "Piece"
  field { number: 1 name: "piece" type: TYPE_STRING }
  field { number: 2 name: "score" type: TYPE_FLOAT }
  field { number: 3 name: "type" type: TYPE_INT32 default_value: "1" }
}
message_type { name: "Trainer"
  field { number: 3 name: "model_type" type: TYPE_INT32 default_value: "1" }
  field { number: 4 name: "vocab_size" type: TYPE_INT32 }
  field { number: 24 name: "treat_whitespace_as_suffix" type: TYPE_BOOL }
  field { number: 43 name: "pad_id" type: TYPE_INT32 default_value: "-1" }
  field { number: 48 name: "pad_piece" type: TYPE_STRING }
}
message_type { name: "Normalizer"
  field { number: 2 name: "precompiled_charsmap" type: TYPE_BYTES }
  field { number: 3 name: "add_dummy_prefix" type: TYPE_BOOL default_value: "true" }
  field { number: 4 name: "remove_extra_whitespaces" type: TYPE_BOOL default_value: "true" }
  field { number: 5 name: "escape_whitespaces" type: TYPE_BOOL default_value: "true" }
}
message_type { name: "Model"
  field { number: 1 name: "pieces" type: TYPE_MESSAGE type_name: "Piece" label: LABEL_REPEATED }
  field { number: 2 name: "trainer" type: TYPE_MESSAGE type_name: "Trainer" }
  field { number: 3 name: "normalizer" type: TYPE_MESSAGE type_name: "Normalizer" }
  field { number: 4 name: "self_test_data" type: TYPE_BYTES }
}
"""
_pool = descriptor_pool.DescriptorPool()
_file = text_format.Parse(_PROTO, descriptor_pb2.FileDescriptorProto())
_pool.AddSerializedFile(_file.SerializeToString())
_Model = message_factory.GetMessageClass(_pool.FindMessageTypeByName("jllama.Model"))


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
    proto = _Model.FromString(model)
    trainer, normalizer = proto.trainer, proto.normalizer
    return SentencePieceModel(
        tuple(Piece(p.piece, p.score, PieceType(p.type)) for p in proto.pieces),
        algorithm={1: "unigram", 2: "bpe", 3: "word", 4: "char"}[trainer.model_type],
        pad_id=None if trainer.pad_id < 0 else trainer.pad_id,
        add_dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
        marks_before=normalizer.escape_whitespaces and not trainer.treat_whitespace_as_suffix,
        charsmap=normalizer.precompiled_charsmap,
    )


def append_pieces(model: bytes, pieces: Iterable[Piece], pad: str = "") -> bytes:
    """Returns the model with more pieces, without its samples of encoding.

    `pad` is the text of a control piece that becomes the model's padding.
    """
    proto = _Model.FromString(model)
    proto.ClearField("self_test_data")
    for piece in pieces:
        proto.pieces.add(piece=piece.text, score=piece.score, type=piece.type)
    proto.trainer.vocab_size = len(proto.pieces)
    if pad:
        proto.trainer.pad_piece = pad
        proto.trainer.pad_id = [piece.piece for piece in proto.pieces].index(pad)
    return proto.SerializeToString()
