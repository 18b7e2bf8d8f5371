"""The interface of every tokenizer: it encodes text to ids, and decodes ids at once or as a stream.

Each kind of tokenizer encodes in its own way. All kinds decode in the same way: with a table of the
bytes of each id, an incremental UTF-8 decoder, and the removal of the space that encoding put
before the text. So decoding a list and streaming it id by id give the same whole characters.
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
# Where encoding adds a space: nowhere, before the text, or before every part of it between added
# tokens.
Prefix = Literal["never", "first", "always"]


class Tokenizer(abc.ABC):
    """Encodes text to ids and decodes ids to text. Can be pickled, for worker processes.

    Attributes:
      vocab_size: the ids are 0 to vocab_size - 1; a few of them may have no text.
      bos_id, eos_id: the ids of the tokens that begin and end a text.
      adds_bos, adds_eos: whether the model was made for texts that begin with BOS, and that end
        with EOS though they are to be continued. `encode` does as it is told.
      special_tokens: text -> id of every control and special token.
      stop_ids: the ids that end a generated text, including `eos_id`.
      carried: keys of tokenizer_config.json that only other programs use (chat_template, pad_token
        and padding_side); they are saved again as they were read.
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
        adds_bos: bool = True,
        adds_eos: bool = False,
        options: Mapping[str, Any],
        where: str,
    ):
        """Called by the subclasses.

        Args:
          table: the bytes that each id adds to the text.
          added: tokens that are looked for in every text before the rest is encoded.
          prefix: where encoding adds a space.
          special_tokens, bos_id, eos_id, adds_bos, adds_eos: the attributes.
          own_stops: ids that end a text by the names of this kind, beside those in `options`.
          options: the keyword arguments that make the subclass again; `stop_ids` is one of them.
          where: the file, for errors.
        """
        self._options = options
        self.vocab_size = len(table)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.adds_bos = adds_bos
        self.adds_eos = adds_eos
        self.special_tokens = dict(special_tokens)
        own_stops = frozenset(own_stops) | {eos_id}
        self.stop_ids = own_stops | frozenset(options["stop_ids"])
        self._more_stops = self.stop_ids != own_stops
        for id in sorted(self.stop_ids):
            if not 0 <= id < len(table):
                raise UserError(
                    f"{where}: eos_token_id {id} of generation_config.json or config.json is not in"
                    f" the vocabulary of {len(table)} ids"
                )
        self._bytes = table
        self._prefix = prefix
        self._visible = frozenset(token.id for token in added if not token.special)
        special = [AddedToken(text, id) for text, id in special_tokens.items()]
        known = {token.text: token for token in (*special, *added)}
        self._user = Splitter([token for token in added if not token.special])
        self._all = Splitter(known.values())

    @property
    def text_size(self) -> int:
        """The ids of every text are below it, and so are BOS and EOS: special tokens may be above.

        A model may have fewer rows than its tokenizer has ids, as Code Llama 34B has.
        """
        special = set(self.special_tokens.values()) - {self.bos_id, self.eos_id}
        ids = (id for id in range(self.vocab_size - 1, -1, -1) if id not in special)
        return next(ids) + 1

    @property
    def adds_space(self) -> bool:
        """Whether encoding adds a space before a text, which decoding removes."""
        return self._prefix != "never"

    @functools.cached_property
    def digest(self) -> str:
        """The tokenizer's identity: a SHA-256, in hex, of everything that decides ids and texts."""
        files = self._files()
        if len(files) == 1:
            return hashlib.sha256(*files.values()).hexdigest()
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def _settings(self) -> dict[str, Any]:
        """Options by their keys in Hugging Face's files, but for those that are not set."""
        settings = {k: self._options[k] for k in ("bos_token", "eos_token") if self._options[k]}
        settings |= {} if self.adds_bos else {"add_bos_token": False}
        settings |= {"add_eos_token": True} if self.adds_eos else {}
        if added := self._options["added"]:
            settings["added_tokens_decoder"] = {str(t.id): t.to_json() for t in added}
        if special := self._options["special"]:
            settings["additional_special_tokens"] = list(special)
        return settings

    @abc.abstractmethod
    def _files(self) -> dict[str, bytes]:
        """Returns the files that decide ids and texts, without stop ids and `carried`."""

    def files(self) -> dict[str, bytes]:
        """Returns the files of a Hugging Face folder, by name; `load_tokenizer` reads them."""
        files = self._files()
        if self.carried:
            config = json.loads(files.get("tokenizer_config.json", b"{}"))
            files["tokenizer_config.json"] = to_json(config | dict(self.carried))
        if self._more_stops:
            files["generation_config.json"] = to_json({"eos_token_id": sorted(self.stop_ids)})
        return files

    def save(self, folder: str | Path) -> None:
        """Writes `files` to a folder, each whole or not at all."""
        folder = storage.path(folder)
        storage.make_folder(folder)
        for name, data in self.files().items():
            storage.write_bytes(folder / name, data)

    @abc.abstractmethod
    def _encode(self, text: str, prefix: bool) -> list[int]:
        """Encodes a text without added tokens, and with a space before it if `prefix`."""

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, special: bool = False
    ) -> list[int]:
        """Returns the ids of `text`, between BOS if `bos` and EOS if `eos`.

        The text of a special token is encoded to that token only if `special` is true. Raises
        UserError if `text` holds an unpaired surrogate.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise UserError(
                f"text: unpaired surrogate U+{ord(text[e.start]):04X} at character {e.start};"
                " it is not a Unicode character, remove it"
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

    def byte_count(self, ids: Iterable[int]) -> int:
        """The bytes that `ids` add to a text, a space that encoding added before it included."""
        return sum(len(self._bytes[id]) for id in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`.

        Special and unknown tokens have no text; broken UTF-8 becomes U+FFFD. Raises UserError for
        an id outside the vocabulary.
        """
        stream = self.stream()
        return "".join([stream.feed(i) for i in ids]) + stream.end()

    def stream(self, after: Iterable[int] = ()) -> "TextStream":
        """Returns a stream that decodes ids one by one, as a continuation of the ids in `after`."""
        stream = TextStream(self)
        for i in after:
            stream.feed(i)
        return stream


def to_json(value: Any) -> bytes:
    """Returns a JSON file; equal values give equal bytes."""
    return (json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()


class TextStream:
    """Decodes ids one by one, in whole characters; all texts joined are `decode` of the ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.adds_space

    def feed(self, id: int) -> str:
        """Returns the text that `id` completes, which is empty inside a character.

        Raises UserError for an id outside the vocabulary.
        """
        tokenizer = self._tokenizer
        if not 0 <= id < tokenizer.vocab_size:
            raise UserError(
                f"token {id}: the vocabulary has ids 0 to {tokenizer.vocab_size - 1};"
                " use the tokenizer that made the ids"
            )
        data = tokenizer._bytes[id]
        if id in tokenizer._visible:
            self._strip = tokenizer._prefix == "always"
        elif self._strip and data:
            data = data.removeprefix(b" ")
            self._strip = False
        return self._utf8.decode(data)

    def end(self) -> str:
        """Returns the rest: U+FFFD if the ids stop inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)
