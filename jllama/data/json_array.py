"""Reads a file that is one JSON array, item by item."""

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any

_BLANK = " \t\r\n"


class BrokenArray(ValueError):
    """The bytes are no JSON array, or end early; the text says where and why."""


def items(chunks: Iterable[bytes], decoder: json.JSONDecoder) -> Iterator[Any]:
    """Yields the items of an array in UTF-8; memory is bounded by the longest, and by a chunk.

    Raises BrokenArray, UnicodeDecodeError, or RecursionError for an item that is nested too deeply.
    """
    text = _Text(chunks)
    text.take("[")
    count = 0
    while count or text.peek() != "]":
        count += 1
        yield text.value(decoder, count)
        if text.peek() == "]":
            break
        text.take(",")
    text.take("]")
    if after := text.peek():
        raise BrokenArray(f"{after!r} after the end of the array")


class _Text:
    """A position in a text that is decoded as it is needed."""

    def __init__(self, chunks: Iterable[bytes]):
        self._chunks = codecs.iterdecode(iter(chunks), "utf-8")
        self._text, self._at = "", 0

    def _extend(self) -> bool:
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        self._text, self._at = self._text[self._at :] + chunk, 0
        return True

    def peek(self) -> str:
        """Goes to the next character that is not blank, and returns it; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANK:
                    return self._text[self._at]
                self._at += 1
            if not self._extend():
                return ""

    def take(self, wanted: str) -> None:
        """Goes behind a character, which must be `wanted`."""
        if (next_one := self.peek()) != wanted:
            raise BrokenArray(
                f"expected {wanted!r}, not {next_one!r}" if next_one else "ends early"
            )
        self._at += 1

    def value(self, decoder: json.JSONDecoder, number: int) -> Any:
        """The value of the item `number`, which starts here."""
        self.peek()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as e:
                if not self._extend():
                    raise BrokenArray(f"item {number}: {e.msg}") from None
                continue
            # At the end of a chunk a number may go on in the next.
            if end < len(self._text) or not self._extend():
                self._at = end
                return value
