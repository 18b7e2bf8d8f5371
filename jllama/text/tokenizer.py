"""SentencePiece tokenizers: text to ids, ids to text, and text from ids as they come.

Encoding is SentencePiece's own. Decoding goes through a table of each piece's bytes, so that
decoding a list and streaming it id by id are one rule and never cut a UTF-8 character in two.

`decode(encode(text)) == text` for every text, given byte fallback and no normalisation (LLaMA's,
Llama-2's and every tokenizer trained here), with one exception that is SentencePiece's: U+2581,
its mark for a space, comes back as a space.
"""

import codecs
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from jllama import storage
from jllama.errors import UserError

_SPACE = "\u2581"
_PART = 1 << 17  # characters
_SPACE_IN_TEXT = re.compile(r"(?<=\S) (?=\S)")


class SentencePieceTokenizer:
    """A SentencePiece model, from its serialised bytes. Pickles, for worker processes."""

    def __init__(self, model: bytes, where: str = "tokenizer"):
        """Raises UserError, naming `where`, unless `model` is one with BOS and EOS."""
        self._model = model
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(model) and self._sp.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError):
            loaded = False
        if not loaded:
            raise UserError(f"{where}: not a SentencePiece model; give the .model file itself")
        self.vocab_size: int = self._sp.vocab_size()
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{where}: has no BOS or no EOS token; train the model with both")

    def __reduce__(self):
        return SentencePieceTokenizer, (self._model,)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the model's bytes, in hex: the tokenizer's identity."""
        return hashlib.sha256(self._model).hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the model file that `load_tokenizer` reads, whole or not at all."""
        storage.write_bytes(storage.path(path), self._model)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, never a control token; `bos` and `eos` add those around it.

        Raises UserError if `text` holds an unpaired surrogate.
        """
        ids = []
        try:
            for part in self._parts(text):
                ids += self._sp.encode(part.encode("utf-8"))
        except UnicodeEncodeError as e:
            raise UserError(
                f"text: unpaired surrogate U+{ord(text[e.start]):04X} at character {e.start}; "
                "it is no Unicode character, remove it"
            ) from None
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def _parts(self, text: str) -> Iterator[str]:
        """Cuts a long text before single spaces: SentencePiece takes 50 bytes of memory a byte.

        The ids are those of the whole text, but for a vocabulary whose pieces cross words.
        """
        at = 0
        while len(text) - at > _PART and (space := _SPACE_IN_TEXT.search(text, at + _PART)):
            yield text[at : space.start()]
            at = space.end() if self._adds_space else space.start()
        yield text[at:]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Control and unknown tokens are dropped; broken UTF-8 becomes U+FFFD.

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

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """What each id adds to the text."""
        sp = self._sp

        def of(i: int) -> bytes:
            if sp.is_control(i) or sp.is_unknown(i):
                return b""
            piece = sp.id_to_piece(i)
            if sp.is_byte(i):
                return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
            return piece.replace(_SPACE, " ").encode()

        return [of(i) for i in range(self.vocab_size)]

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether encoding puts a space before the text (LLaMA does), for decoding to remove."""
        ids = self._sp.encode("a")
        return bool(ids) and self._sp.id_to_piece(ids[0]).startswith(_SPACE)


class TextStream:
    """Ids in, text out, in whole characters; all of it joined is `decode` of the ids."""

    def __init__(self, tokenizer: SentencePieceTokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer._adds_space

    def feed(self, id: int) -> str:
        """The text that `id` completes; empty inside a character. UserError if out of range."""
        if not 0 <= id < self._tokenizer.vocab_size:
            raise UserError(
                f"token {id}: the vocabulary has ids 0 to {self._tokenizer.vocab_size - 1}; "
                "use the tokenizer that the ids were made with"
            )
        data = self._tokenizer._bytes[id]
        if self._strip and data:
            data = data.removeprefix(b" ")
            self._strip = False
        return self._utf8.decode(data)

    def end(self) -> str:
        """What is left: U+FFFD if the ids stop inside a character."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: str | Path) -> SentencePieceTokenizer:
    """A tokenizer from its .model file, or from a folder that holds tokenizer.model; URLs too."""
    path = storage.path(path)
    if storage.is_folder(path):
        path = path / "tokenizer.model"
    try:
        return SentencePieceTokenizer(storage.read_bytes(path), where=str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer file") from None
