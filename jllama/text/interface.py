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
from types import MappingProxyType
from typing import Any, Literal

from jllama.errors import UserError
from jllama.files import storage
from jllama.text.added import AddedToken, Splitter

SPACE = "\u2581"  # SentencePiece's mark for a space
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
      carried: chat_template, pad_token, padding_side: keys of tokenizer_config.json for others.
    """

    carried: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        *,
        table: list[bytes],
        added: Sequence[AddedToken],
        prefix: Prefix,
        special_tokens: Mapping[str, int],
        bos_id: int,
        eos_id: int,
        own_stops: Iterable[int] = (),
        content: Any,
        options: Mapping[str, Any],
        where: str,
    ):
        """For the kinds.

        Args:
          content, options: what makes it again: its class's first argument, and those by name,
            `stop_ids` among them.
          table: what each id adds to the text.
          added: tokens that every text is searched for before the rest is encoded.
          prefix: where encoding puts a space.
          own_stops: ids that end a text by this kind's own names, beside those of `options`.
          where: the file, for errors.
        """
        self._content, self._options = content, options
        self.vocab_size = len(table)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.special_tokens = dict(special_tokens)
        own_stops = frozenset(own_stops) | {eos_id}
        self.stop_ids = own_stops | frozenset(options["stop_ids"])
        self._more_stops = self.stop_ids != own_stops
        for id in sorted(self.stop_ids):
            if not 0 <= id < len(table):
                raise UserError(
                    f"{where}: eos_token_id {id} of generation_config.json is not in the vocabulary"
                    f" of {len(table)}"
                )
        self._bytes = table
        self._prefix = prefix
        self._visible = frozenset(token.id for token in added if not token.special)
        special = [AddedToken(text, id) for text, id in special_tokens.items()]
        known = {token.text: token for token in (*special, *added)}
        self._user = Splitter([token for token in added if not token.special])
        self._all = Splitter(known.values())

    def __reduce__(self):
        make = functools.partial(type(self), **self._options)
        return make, (self._content,), {"carried": dict(self.carried)}

    @property
    def adds_space(self) -> bool:
        """Whether encoding puts a space before a text, which decoding takes away."""
        return self._prefix != "never"

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of what decides ids and texts: the tokenizer's identity."""
        files = self._files()
        if len(files) == 1:
            return hashlib.sha256(*files.values()).hexdigest()
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    @abc.abstractmethod
    def _files(self) -> dict[str, bytes]:
        """`files`, but for what only says where texts end."""

    def files(self) -> dict[str, bytes]:
        """Contents by name, as in Hugging Face folders; `load_tokenizer` reads them back."""
        files = self._files()
        if self.carried:
            config = json.loads(files.get("tokenizer_config.json", b"{}"))
            files["tokenizer_config.json"] = to_json(config | dict(self.carried))
        if self._more_stops:
            files["generation_config.json"] = to_json({"eos_token_id": sorted(self.stop_ids)})
        return files

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
        first, always = True, self._prefix == "always"
        for part in (self._all if special else self._user).split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode(part, always or (first and self._prefix == "first"))
            first = False
        return [*ids, self.eos_id] if eos else ids

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


def to_json(value: Any) -> bytes:
    """A file of JSON, the same for the same value."""
    return (json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


class TextStream:
    """Ids in, text out, in whole characters; all of it joined is `decode` of the ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.adds_space

    def feed(self, id: int) -> str:
        """The text that `id` completes; empty inside a character. UserError if out of range."""
        tokenizer = self._tokenizer
        if not 0 <= id < tokenizer.vocab_size:
            raise UserError(
                f"token {id}: the vocabulary has ids 0 to {tokenizer.vocab_size - 1}; "
                "use the tokenizer that the ids were made with"
            )
        data = tokenizer._bytes[id]
        if id in tokenizer._visible:
            self._strip = tokenizer._prefix == "always"
        elif self._strip and data:
            data = data.removeprefix(b" ")
            self._strip = False
        return self._utf8.decode(data)

    def end(self) -> str:
        """What is left: U+FFFD if the ids stop inside a character."""
        return self._utf8.decode(b"", final=True)
