"""Tokens added to a vocabulary: where their texts stand in a text."""

import dataclasses
import re
from collections.abc import Iterable, Iterator


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before the rest is encoded; fields as Hugging Face's.

    Attributes:
      special: found only where special tokens are asked for, and no part of decoded text.
      lstrip, rstrip: takes the white space on that side with it.
      single_word: found only between word boundaries.
      normalized: found in the text after normalisation, which may have put a space before it.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Splitter:
    """Cuts texts at added tokens: the leftmost first, and of those that begin there the longest."""

    def __init__(self, tokens: Iterable[AddedToken]):
        ordered = sorted(tokens, key=lambda t: -len(t.text))
        self._ids = [token.id for token in ordered]
        self._pattern = re.compile("|".join(f"({_pattern(token)})" for token in ordered))

    def split(self, text: str) -> Iterator[str | int]:
        """Texts between tokens, none of them empty, and the tokens' ids."""
        at = 0
        if self._ids:
            for match in self._pattern.finditer(text):
                if at < match.start():
                    yield text[at : match.start()]
                yield self._ids[match.lastindex - 1]
                at = match.end()
        if at < len(text):
            yield text[at:]


def _pattern(token: AddedToken) -> str:
    text = re.escape(token.text)
    if token.single_word:
        text = rf"(?<!\w){text}(?!\w)"
    return r"\s*" * token.lstrip + text + r"\s*" * token.rstrip
