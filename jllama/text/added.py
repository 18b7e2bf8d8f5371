"""Tokens added to a vocabulary: their properties, and how a text is split at them."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from jllama.errors import UserError

MAX_VOCAB_SIZE = 1 << 24
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in a text before the rest is encoded.

    The fields are Hugging Face's.

    Attributes:
      special: is matched only if special tokens are asked for, and decodes to no text.
      lstrip, rstrip: the match includes the white space on the left, on the right.
      single_word: is matched only between word boundaries.
      normalized: is matched in the text after normalisation.
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
        """Whether its match is its text alone, whatever stands beside it."""
        return not (self.lstrip or self.rstrip or self.single_word)

    @classmethod
    def from_json(cls, value: Mapping, id: int) -> "AddedToken":
        """Reads Hugging Face's keys. Raises KeyError or TypeError for anything else."""
        text = value["content"]
        if type(id) is not int or not isinstance(text, str) or not text:
            raise TypeError
        return cls(text, id, **{flag: bool(value.get(flag, False)) for flag in _FLAGS})

    def to_json(self) -> dict:
        return {"content": self.text} | {flag: getattr(self, flag) for flag in _FLAGS}


def check_added_tokens(added: Iterable[AddedToken], ids: Mapping[str, int], where: str) -> None:
    """Raises UserError if an added token has an id or a text of another token.

    `ids` are the vocabulary's. There may be ids between the two without a token: a model may have
    rows that no text is encoded to.
    """
    ids = dict(ids)
    texts = {id: text for text, id in ids.items()}
    for token in added:
        if not 0 <= token.id < MAX_VOCAB_SIZE:
            raise UserError(f"{where}: added token {token.text!r} has the impossible id {token.id}")
        if ids.setdefault(token.text, token.id) != token.id:
            raise UserError(
                f"{where}: added token {token.text!r} has the id {token.id}, but"
                f" {ids[token.text]} elsewhere in this tokenizer; correct one of them"
            )
        if texts.setdefault(token.id, token.text) != token.text:
            raise UserError(
                f"{where}: added token {token.text!r} has the id {token.id}, which belongs to"
                f" {texts[token.id]!r}; give it a free id"
            )


class Splitter:
    """Splits texts at added tokens: the leftmost first, and the longest of those at one place."""

    def __init__(self, tokens: Iterable[AddedToken]):
        ordered = sorted(tokens, key=lambda t: -len(t.text))
        self._flagged = [token.id for token in ordered if not token.plain]
        self._plain = {token.text: token.id for token in ordered if token.plain}
        # Only tokens with flags get a group, because a search without groups is fast.
        parts = [re.escape(t.text) if t.plain else _pattern(t) for t in ordered]
        self._pattern = re.compile("|".join(parts)) if parts else None

    def split(self, text: str) -> Iterator[str | int]:
        """Yields, in order, the ids of the tokens and the texts between them, if not empty."""
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
    # A match may begin only at the first white space: else a long run takes quadratic time.
    return "(" + r"(?:(?<!\s)\s+)?" * token.lstrip + text + r"\s*" * token.rstrip + ")"
