"""SentencePiece models, and the tokens that Hugging Face's files add to them.

Encoding is SentencePiece's own. `decode(encode(text)) == text` for every text, given byte fallback
and no normalisation (LLaMA's, Llama-2's and every tokenizer trained here), with one exception that
is SentencePiece's: U+2581, its mark for a space, comes back as a space.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from jllama.errors import UserError
from jllama.text.added import AddedToken
from jllama.text.interface import Tokenizer

SPACE = "\u2581"
_PART = 1 << 17  # characters
_SPACE_IN_TEXT = re.compile(r"(?<=\S) (?=\S)")
# Protocol buffers merge when they are joined: this sets normalizer_spec.add_dummy_prefix to false.
_NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, and tokens added to it.

    Attributes:
      model: the serialised model.
      added_tokens: the tokens that are not in the model, text -> id.
    """

    def __init__(
        self,
        model: bytes,
        where: str = "tokenizer",
        *,
        added: Iterable[AddedToken] = (),
        legacy: bool = True,
        bos: str = "",
        eos: str = "",
        stop_ids: Iterable[int] = (),
    ):
        """Raises UserError, naming `where`, unless `model` is one with BOS and EOS.

        Args:
          model: the bytes of the .model file.
          added: tokens with ids of their own, or pieces of the model with other flags.
          legacy: whether a text after an added token gets a space too; Hugging Face's key.
          bos, eos: tokens to take instead of the model's.
          stop_ids: ids that end a text, besides EOS.
        """
        self.model = model
        self._sp = sp = _processor(model, where)
        pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        control = {p: i for i, p in enumerate(pieces) if sp.is_control(i) or sp.is_unknown(i)}
        ids = dict(zip(pieces, range(len(pieces)), strict=True))
        added = tuple(added)
        for token in added:
            if ids.get(token.text, token.id) != token.id:
                raise UserError(
                    f"{where}: added token {token.text!r} has id {token.id}, and"
                    f" {ids[token.text]} in the model; remove one of them"
                )
            if token.id < len(pieces) and pieces[token.id] != token.text:
                raise UserError(
                    f"{where}: added token {token.text!r} has the id {token.id} of the model's"
                    f" piece {pieces[token.id]!r}; ids of added tokens begin at {len(pieces)}"
                )
        own = [token for token in added if token.id >= len(pieces)]
        self.added_tokens = {token.text: token.id for token in own}
        special = control | {token.text: token.id for token in added if token.special}
        table = [b"" if i in control.values() else _bytes(sp, i) for i in range(len(pieces))]
        # Ids between the model's and the last added one may have no token: their rows stay unused.
        table += [b""] * (max(self.added_tokens.values(), default=-1) + 1 - len(table))
        for token in own:
            table[token.id] = token.text.encode()
        for id in special.values():
            table[id] = b""
        texts = ids | self.added_tokens
        self._options = {
            "added": added,
            "legacy": legacy,
            "bos": bos,
            "eos": eos,
            "stop_ids": tuple(sorted(stop_ids)),
        }
        first = sp.encode("a")
        adds_space = bool(first) and pieces[first[0]].startswith(SPACE)
        prefix = ("always" if legacy else "first") if adds_space else "never"
        super().__init__(
            table=table,
            added=[token for token in own if not token.special],
            prefix=prefix,
            special_tokens=special,
            bos_id=_named(texts, bos, sp.bos_id(), f"{where}: bos_token"),
            eos_id=_named(texts, eos, sp.eos_id(), f"{where}: eos_token"),
            stop_ids=stop_ids,
        )

    def __reduce__(self):
        return functools.partial(SentencePieceTokenizer, **self._options), (self.model,)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.model}

    def _encode(self, text: str, prefix: bool) -> list[int]:
        sp = self._sp if prefix else self._without_prefix
        ids = []
        for part in self._parts(text):
            ids += sp.encode(part.encode("utf-8"))
        return ids

    @functools.cached_property
    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        return _processor(self.model + _NO_PREFIX, "tokenizer")

    def _parts(self, text: str) -> Iterator[str]:
        """Cuts a long text before single spaces: SentencePiece takes 50 bytes of memory a byte.

        The ids are those of the whole text, but for a vocabulary whose pieces cross words.
        """
        at = 0
        while len(text) - at > _PART and (space := _SPACE_IN_TEXT.search(text, at + _PART)):
            yield text[at : space.start()]
            at = space.start() if self._prefix == "never" else space.end()
        yield text[at:]


def _processor(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    sp = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(model) and sp.LoadFromSerializedProto(model)
    except (RuntimeError, ValueError):
        loaded = False
    if not loaded:
        raise UserError(f"{where}: not a SentencePiece model; give the .model file itself")
    return sp


def _bytes(sp: sentencepiece.SentencePieceProcessor, id: int) -> bytes:
    """What an id adds to the text."""
    piece = sp.id_to_piece(id)
    if sp.is_byte(id):
        return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
    return piece.replace(SPACE, " ").encode()


def _named(ids: dict[str, int], text: str, otherwise: int, what: str) -> int:
    if text and text not in ids:
        raise UserError(f"{what} {text!r} is not in the vocabulary; name a token that is")
    id = ids[text] if text else otherwise
    if id < 0:
        raise UserError(f"{what}: the model has none; train it with BOS and EOS")
    return id
