"""Tokens added to a vocabulary: what is said of them, and where their texts stand in a text."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from jllama.errors import UserError

MAX_VOCAB_SIZE = 1 << 24
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before the rest is encoded; fields as Hugging Face's.

    Attributes:
      special: found only where special tokens are asked for, and no part of decoded text.
      lstrip, rstrip: takes the white space on that side with it.
      single_word: found only between word boundaries.
      normalized: found in the text after normalisation.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @property
    def plain(self) -> bool:
        """Found whatever is beside it, and takes nothing of that."""
        return not (self.lstrip or self.rstrip or self.single_word)

    @classmethod
    def from_json(cls, value: Mapping, id: int) -> "AddedToken":
        """From Hugging Face's keys. Raises KeyError or TypeError for anything else."""
        text = value["content"]
        if type(id) is not int or not isinstance(text, str) or not text:
            raise TypeError
        return cls(text, id, **{flag: bool(value.get(flag, False)) for flag in _FLAGS})

    def as_special(self, special: bool) -> "AddedToken":
        return dataclasses.replace(self, special=special)

    def to_json(self) -> dict:
        return {"content": self.text} | {flag: getattr(self, flag) for flag in _FLAGS}


def check_added_tokens(added: Iterable[AddedToken], ids: Mapping[str, int], where: str) -> None:
    """Raises UserError unless `added` tokens have ids of their own beside the vocabulary's `ids`.

    Ids that no token has are allowed between them: the rows of a model are what they are, and
    such a one is never made from text.
    """
    ids = dict(ids)
    texts = {id: text for text, id in ids.items()}
    for token in added:
        if not 0 <= token.id < MAX_VOCAB_SIZE:
            raise UserError(f"{where}: added token {token.text!r} has the impossible id {token.id}")
        if ids.setdefault(token.text, token.id) != token.id:
            raise UserError(
                f"{where}: added token {token.text!r} has the id {token.id}, and"
                f" {ids[token.text]} elsewhere in this tokenizer; correct one of them"
            )
        if texts.setdefault(token.id, token.text) != token.text:
            raise UserError(
                f"{where}: added token {token.text!r} has the id {token.id}, which is that of"
                f" {texts[token.id]!r}; give it one that is free"
            )


class Splitter:
    """Cuts texts at added tokens: the leftmost first, and of those that begin there the longest."""

    def __init__(self, tokens: Iterable[AddedToken]):
        ordered = sorted(tokens, key=lambda t: -len(t.text))
        self._flagged = [token.id for token in ordered if not token.plain]
        self._plain = {token.text: token.id for token in ordered if token.plain}
        # Groups for those alone whose texts are not what is found: without them search is fast.
        parts = [re.escape(t.text) if t.plain else _pattern(t) for t in ordered]
        self._pattern = re.compile("|".join(parts)) if parts else None

    def split(self, text: str) -> Iterator[str | int]:
        """Texts between tokens, none of them empty, and the tokens' ids."""
        at = 0
        if self._pattern:
            for match in self._pattern.finditer(text):
                if at < match.start():
                    yield text[at : match.start()]
                number = match.lastindex
                yield self._flagged[number - 1] if number else self._plain[match.group()]
                at = match.end()
        if at < len(text):
            yield text[at:]


def _pattern(token: AddedToken) -> str:
    text = re.escape(token.text)
    if token.single_word:
        text = rf"(?<!\w){text}(?!\w)"
    # White space is tried from its beginning alone: a long run would take its length squared.
    return "(" + r"(?:(?<!\s)\s+)?" * token.lstrip + text + r"\s*" * token.rstrip + ")"
