"""SentencePiece models, and the tokens that Hugging Face's files add to them.

Encoding is SentencePiece's own. `decode(encode(text)) == text` for every text, given byte fallback
and no normalisation (LLaMA's, Llama-2's and every tokenizer trained here), with one exception that
is SentencePiece's: U+2581, its mark for a space, comes back as a space.
"""

import functools
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from jllama.errors import UserError
from jllama.text.added import AddedToken, check_added_tokens
from jllama.text.interface import SPACE, Tokenizer, to_json

_PART = 1 << 17  # characters
_SPACE_IN_TEXT = re.compile(r"(?<=\S) (?=\S)")
# Protocol buffers merge when they are joined: this sets normalizer_spec.add_dummy_prefix to false.
_NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, and tokens added to it.

    Attributes:
      model: the serialised model.
      pieces: the model's own, by id.
      added_tokens: the tokens that are not in the model, text -> id.
    """

    def __init__(
        self,
        model: bytes,
        where: str = "tokenizer",
        *,
        added: Iterable[AddedToken] = (),
        special: Iterable[str] = (),
        legacy: bool = True,
        bos_token: str = "",
        eos_token: str = "",
        stop_ids: Iterable[int] = (),
    ):
        """Raises UserError, naming `where`, unless `model` is one with BOS and EOS.

        Args:
          model: the bytes of the .model file.
          added: tokens with ids of their own; those that are pieces of the model change nothing.
          special: texts of tokens that are special, besides the model's control tokens.
          legacy: whether a text after an added token gets a space too; Hugging Face's key.
          bos_token, eos_token: tokens to take instead of the model's.
          stop_ids: ids that end a text, besides EOS.
        """
        self.model = model
        self._sp = sp = _processor(model, where)
        self.pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        ids = {piece: i for i, piece in enumerate(self.pieces)}
        added = tuple(added)
        check_added_tokens(added, ids, where)
        own = tuple(token for token in added if token.text not in ids)
        self.added_tokens = {token.text: token.id for token in own}
        self.legacy = legacy
        ids |= self.added_tokens
        names = {i: text for text, i in ids.items()}
        bos = _end(ids, bos_token, sp.bos_id(), f"{where}: bos_token")
        eos = _end(ids, eos_token, sp.eos_id(), f"{where}: eos_token")
        control = {i for i in range(len(self.pieces)) if sp.is_control(i) or sp.is_unknown(i)}
        said = {ids[text] for text in special if text in ids} | {bos, eos}
        said |= {token.id for token in own if token.special}
        table = [b""] * (max(names) + 1)
        for i in names.keys() - control - said:
            table[i] = _bytes(sp, i) if i < len(self.pieces) else names[i].encode()
        self.added = [token.as_special(token.id in said) for token in own]
        options = {
            "added": own,
            "special": tuple(names[i] for i in sorted(said - control)),
            "legacy": legacy,
            "bos_token": "" if bos == sp.bos_id() else bos_token,
            "eos_token": "" if eos == sp.eos_id() else eos_token,
            "stop_ids": tuple(sorted(stop_ids)),
        }
        # Special by name, though SentencePiece would make them from text: spelt by letters there.
        self._spelt = {i: names[i] for i in said - control if i < len(self.pieces)}
        first = sp.encode("a")
        adds_space = bool(first) and self.pieces[first[0]].startswith(SPACE)
        super().__init__(
            table=table,
            added=self.added,
            prefix=("always" if legacy else "first") if adds_space else "never",
            special_tokens={names[i]: i for i in sorted(control | said)},
            bos_id=bos,
            eos_id=eos,
            content=model,
            options=options,
            where=where,
        )

    def _files(self) -> dict[str, bytes]:
        files = {"tokenizer.model": self.model}
        settings = {k: self._options[k] for k in ("bos_token", "eos_token") if self._options[k]}
        if added := self._options["added"]:
            settings["added_tokens_decoder"] = {str(t.id): t.to_json() for t in added}
        if special := self._options["special"]:
            settings["additional_special_tokens"] = list(special)
        if not self._options["legacy"]:
            settings["legacy"] = False
        if settings:
            settings["tokenizer_class"] = "LlamaTokenizer"
            files["tokenizer_config.json"] = to_json(settings)
        return files

    def _encode(self, text: str, prefix: bool) -> list[int]:
        sp = self._sp if prefix or self._prefix == "never" else self._without_prefix
        ids = []
        for part in _parts(text, prefix):
            ids += sp.encode(part.encode("utf-8"))
        if self._spelt.keys() & ids:
            ids = [i for id in ids for i in (self._letters(id) if id in self._spelt else [id])]
        return ids

    def _letters(self, id: int) -> list[int]:
        sp = self._without_prefix
        return [i for letter in self._spelt[id] for i in sp.encode(letter)]

    @functools.cached_property
    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        return _processor(self.model + _NO_PREFIX, "tokenizer")


def _parts(text: str, prefix: bool) -> Iterator[str]:
    """Cuts a long text before single spaces: SentencePiece takes 50 bytes of memory a byte.

    The ids are those of the whole text, but for a vocabulary whose pieces cross words, and for near
    ties in a Unigram model, whose sums of scores lose digits over a long text. `prefix`: each part
    gets a space of its own, and the one before it is left out.
    """
    at = 0
    while len(text) - at > _PART and (space := _SPACE_IN_TEXT.search(text, at + _PART)):
        yield text[at : space.start()]
        at = space.end() if prefix else space.start()
    yield text[at:]


def _processor(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    sp = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(model) and sp.LoadFromSerializedProto(model)
    except (RuntimeError, ValueError):
        loaded = False
    if not loaded:
        raise UserError(
            f"{where}: not a SentencePiece model, Llama 3's tokenizer.model or a tokenizer.json;"
            " give the file itself"
        )
    return sp


def _bytes(sp: sentencepiece.SentencePieceProcessor, id: int) -> bytes:
    """What an id adds to the text."""
    piece = sp.id_to_piece(id)
    if sp.is_byte(id):
        return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
    return piece.replace(SPACE, " ").encode()


def _end(ids: dict[str, int], text: str, otherwise: int, what: str) -> int:
    if text and text not in ids:
        raise UserError(f"{what} {text!r} is not in the vocabulary; name a token that is")
    id = ids[text] if text else otherwise
    if id < 0:
        raise UserError(f"{what}: the model has none; train it with BOS and EOS")
    return id
