"""Fields of protocol buffers, against google's own writer."""

import pytest
from google.protobuf import descriptor_pb2

from jllama.files.protobuf import bytes_field, fields, fixed32_field, varint_field


def test_fields_are_read_as_they_were_written():
    long = b"x" * 300
    message = varint_field(43, 2**40) + bytes_field(1, long) + fixed32_field(2, b"\0\1\2\3")
    assert list(fields(message)) == [(43, 2**40), (1, long), (2, b"\0\1\2\3")]
    assert list(fields(memoryview(message))) == list(fields(message))


def test_google_writes_the_same_bytes():
    theirs = descriptor_pb2.FieldDescriptorProto(name="tokens", number=1000)
    assert theirs.SerializeToString() == bytes_field(1, b"tokens") + varint_field(3, 1000)
    negative = descriptor_pb2.FieldDescriptorProto(number=-1).SerializeToString()
    assert list(fields(negative)) == [(3, -1)]


def test_a_message_that_ends_early_is_an_error():
    with pytest.raises(IndexError):
        list(fields(b"\x08\x80"))
