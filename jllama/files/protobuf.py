"""The wire format of protocol buffers (protobuf.dev/programming-guides/encoding), read and written.

The protobuf package is not used: the modules that it generates ask for versions that other packages
do not allow.
"""

from collections.abc import Iterator
from typing import TypeVar

Buffer = TypeVar("Buffer", bytes, memoryview)
_FIXED = {1: 8, 5: 4}  # bytes of the wire types for numbers of fixed width


def fields(message: Buffer) -> Iterator[tuple[int, int | Buffer]]:
    """The number and the value of each field, in order.

    A varint is an int, negative where bit 63 is set; any other value is a part of `message`. Raises
    IndexError for a message that ends within a varint, and KeyError for a group, which is no longer
    in use.
    """
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _read_varint(message, at)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        if wire == 2:
            size, at = _read_varint(message, at)
        else:
            size = _FIXED[wire]
        yield number, message[at : at + size]
        at += size


def _read_varint(message: Buffer, at: int) -> tuple[int, int]:
    """The varint at a place, and the place after it."""
    byte = message[at]
    value, shift = byte & 0x7F, 7
    while byte >= 0x80:
        at += 1
        byte = message[at]
        value |= (byte & 0x7F) << shift
        shift += 7
    return value, at + 1


def varint_field(number: int, value: int) -> bytes:
    """A field with a count: `value` is not negative."""
    return _varint(number * 8) + _varint(value)


def bytes_field(number: int, value: bytes) -> bytes:
    """A field with a text's bytes, or with a message."""
    return _varint(number * 8 + 2) + _varint(len(value)) + value


def fixed32_field(number: int, value: bytes) -> bytes:
    """A field with 4 bytes, such as a float's."""
    return _varint(number * 8 + 5) + value


def _varint(value: int) -> bytes:
    out = []
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
