"""What every tokenizer does: text to ids, ids to text, and text from ids as they come.

Encoding is each kind's own. Decoding is one rule for all: a table of each id's bytes, one UTF-8
decoder, and the removal of a space that encoding put before the text. So decoding a list and
streaming it id by id are the same, and never cut a UTF-8 character in two.
"""

import abc
import codecs
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from jllama import storage
from jllama.errors import UserError
from jllama.text.added import AddedToken, Splitter

# Where encoding puts a space that is not in the text: before it, or before each part between
# added tokens.
Prefix = Literal["never", "first", "always"]


class Tokenizer(abc.ABC):
    """Text to ids and back. Pickles, for worker processes.

    Attributes:
      vocab_size: ids are 0 to vocab_size - 1; a few of them may have no text.
      bos_id, eos_id: the tokens that begin and end a text.
      special_tokens: every control and special token, text -> id.
      stop_ids: ids that end a generated text, `eos_id` among them.
    """

    def __init__(
        self,
        *,
        table: list[bytes],
        added: Sequence[AddedToken],
        prefix: Prefix,
        special_tokens: Mapping[str, int],
        bos_id: int,
        eos_id: int,
        stop_ids: Iterable[int],
    ):
        """`table` is what each id adds to the text; `added` the tokens found before encoding."""
        self.vocab_size = len(table)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.special_tokens = dict(special_tokens)
        self.stop_ids = frozenset(stop_ids) | {eos_id}
        self._bytes = table
        self._prefix = prefix
        visible = [token for token in added if not token.special]
        self._apart = frozenset(token.id for token in visible if not token.normalized)
        special = [AddedToken(text, id) for text, id in special_tokens.items()]
        special = {token.text: token for token in (*special, *added) if token.special}
        raw = [token for token in visible if not token.normalized]
        self._user = Splitter(raw)
        self._all = Splitter([*raw, *special.values()])
        self._normalized = Splitter([token for token in visible if token.normalized])

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of what decides ids and texts: the tokenizer's identity."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        # What ends a text changes no prepared data.
        files = {n: data for n, data in self.files().items() if n != "generation_config.json"}
        if len(files) > 1:
            digests = {n: hashlib.sha256(data).hexdigest() for n, data in sorted(files.items())}
            return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
        return hashlib.sha256(*files.values()).hexdigest()

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """Contents by name, as in Hugging Face folders; `load_tokenizer` reads them back."""

    def save(self, folder: str | Path) -> None:
        """Writes `files` into a folder, each whole or not at all."""
        folder = storage.path(folder)
        storage.make_folder(folder)
        for name, data in self.files().items():
            storage.write_bytes(folder / name, data)

    @abc.abstractmethod
    def _encode(self, text: str, prefix: bool) -> list[int]:
        """Ids of a text without added tokens, after a space if `prefix`."""

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, special: bool = False
    ) -> list[int]:
        """Ids of `text`; `bos` and `eos` add those tokens around it.

        A special token is never made from its text, unless `special` is true. Raises UserError if
        `text` holds an unpaired surrogate.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise UserError(
                f"text: unpaired surrogate U+{ord(text[e.start]):04X} at character {e.start}; "
                "it is no Unicode character, remove it"
            ) from None
        ids = [self.bos_id] if bos else []
        first = True
        for part in (self._all if special else self._user).split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode(part, self._prefix == "always" or first)
            first = False
        return ids + [self.eos_id] if eos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Special and unknown tokens are dropped; broken UTF-8 becomes U+FFFD.

        Raises UserError for an id outside the vocabulary.
        """
        stream = self.stream()
        return "".join([stream.feed(i) for i in ids]) + stream.end()

    def stream(self, after: Iterable[int] = ()) -> "TextStream":
        """Text from ids as they come; `after` is a prompt whose own text is not repeated."""
        stream = TextStream(self)
        for i in after:
            stream.feed(i)
        return stream


class TextStream:
    """Ids in, text out, in whole characters; all of it joined is `decode` of the ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer._prefix != "never"

    def feed(self, id: int) -> str:
        """The text that `id` completes; empty inside a character. UserError if out of range."""
        tokenizer = self._tokenizer
        if not 0 <= id < tokenizer.vocab_size:
            raise UserError(
                f"token {id}: the vocabulary has ids 0 to {tokenizer.vocab_size - 1}; "
                "use the tokenizer that the ids were made with"
            )
        data = tokenizer._bytes[id]
        if id in tokenizer._apart:
            self._strip = tokenizer._prefix == "always"
        elif self._strip and data:
            data = data.removeprefix(b" ")
            self._strip = False
        return self._utf8.decode(data)

    def end(self) -> str:
        """What is left: U+FFFD if the ids stop inside a character."""
        return self._utf8.decode(b"", final=True)
