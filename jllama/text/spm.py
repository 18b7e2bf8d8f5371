"""Tokenizers of SentencePiece models, with the tokens that Hugging Face's files add to them.

SentencePiece encodes. With byte fallback and without normalisation, as in LLaMA's and Llama-2's
tokenizers and all that jllama trains, `decode(encode(text)) == text` for every text but one that
holds U+2581: SentencePiece marks spaces with it, so it is decoded to a space.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from jllama.errors import UserError
from jllama.text.added import AddedToken, check_added_tokens
from jllama.text.interface import SPACE, Tokenizer, to_json

_PART = 1 << 17  # characters
_SPACE_IN_TEXT = re.compile(r"(?<=\S) (?=\S)")
# Appended to a model, this field sets normalizer_spec.add_dummy_prefix to false.
_NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """The tokenizer of a SentencePiece model and of tokens added to it.

    Attributes:
      model: the serialised model.
      pieces: texts of the model's pieces, by id.
      added_tokens: text -> id of the tokens that are not in the model.
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
        adds_bos: bool = True,
        adds_eos: bool = False,
    ):
        """Raises UserError, naming `where`, unless `model` is a model with BOS and EOS.

        Args:
          model: the bytes of the .model file.
          added: tokens beside the model; those that are pieces of it are ignored.
          special: texts of tokens that are special, besides the model's control tokens.
          legacy: whether a text after an added token gets a space too; Hugging Face's key.
          bos_token, eos_token: tokens to use instead of the model's.
          stop_ids: ids that end a text, besides EOS.
          adds_bos, adds_eos: the attributes.
        """
        self.model = model
        self._sp = sp = _processor(model, where)
        self.pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
        ids = {piece: i for i, piece in enumerate(self.pieces)}
        added = tuple(added)
        check_added_tokens(added, ids, where)
        added = tuple(token for token in added if token.text not in ids)
        self.added_tokens = {token.text: token.id for token in added}
        self.legacy = legacy
        ids |= self.added_tokens
        names = {i: text for text, i in ids.items()}
        bos = _find_id(ids, bos_token, sp.bos_id(), f"{where}: bos_token")
        eos = _find_id(ids, eos_token, sp.eos_id(), f"{where}: eos_token")
        control = {i for i in range(len(self.pieces)) if sp.is_control(i) or sp.is_unknown(i)}
        declared = {ids[text] for text in special if text in ids} | {bos, eos}
        declared |= {token.id for token in added if token.special}
        table = [b""] * (max(names) + 1)
        for i in names.keys() - control - declared:
            table[i] = _bytes(sp, i) if i < len(self.pieces) else names[i].encode()
        self.added = [dataclasses.replace(token, special=token.id in declared) for token in added]
        options = {
            "added": added,
            "special": tuple(names[i] for i in sorted(declared - control)),
            "legacy": legacy,
            "bos_token": "" if bos == sp.bos_id() else bos_token,
            "eos_token": "" if eos == sp.eos_id() else eos_token,
            "stop_ids": tuple(sorted(stop_ids)),
            "adds_bos": adds_bos,
            "adds_eos": adds_eos,
        }
        # These pieces are special though SentencePiece encodes text to them. Where it does, their
        # letters are encoded one by one instead.
        self._spelt = {i: names[i] for i in declared - control if i < len(self.pieces)}
        self._squeezes = sp.encode("a  b") == sp.encode("a b")
        first = sp.encode("a")
        adds_space = bool(first) and self.pieces[first[0]].startswith(SPACE)
        super().__init__(
            table=table,
            added=self.added,
            prefix=("always" if legacy else "first") if adds_space else "never",
            special_tokens={names[i]: i for i in sorted(control | declared)},
            bos_id=bos,
            eos_id=eos,
            adds_bos=adds_bos,
            adds_eos=adds_eos,
            options=options,
            where=where,
        )

    def _files(self) -> dict[str, bytes]:
        files = {"tokenizer.model": self.model}
        settings = self._settings()
        if not self._options["legacy"]:
            settings["legacy"] = False
        if settings:
            settings["tokenizer_class"] = "LlamaTokenizer"
            files["tokenizer_config.json"] = to_json(settings)
        return files

    def _encode(self, text: str, prefix: bool) -> list[int]:
        sp = self._sp if prefix or self._prefix == "never" else self._without_prefix
        ids = []
        # A part without a space before it cannot begin with the text's own where that is removed.
        whole = self._squeezes and not prefix
        for part in [text] if whole else _parts(text, prefix):
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
    """Cuts a long text before single spaces, because SentencePiece needs 50 times its memory.

    The ids are those of the whole text, except in a vocabulary whose pieces cross words, and for
    near ties in a Unigram model, whose sums of scores lose digits over a long text. With `prefix`
    SentencePiece adds a space to each part, so the text's own space before the part is left out.
    """
    at = 0
    while len(text) - at > _PART and (space := _SPACE_IN_TEXT.search(text, at + _PART)):
        yield text[at : space.start()]
        at = space.end() if prefix else space.start()
    yield text[at:]


def _processor(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    with contextlib.suppress(RuntimeError, ValueError):
        if model:
            return sentencepiece.SentencePieceProcessor(model_proto=model)
    raise UserError(
        f"{where}: not a SentencePiece model, Llama 3's tokenizer.model or a tokenizer.json;"
        " give the file itself"
    )


def _bytes(sp: sentencepiece.SentencePieceProcessor, id: int) -> bytes:
    """Returns the bytes that an id adds to the text."""
    piece = sp.id_to_piece(id)
    if sp.is_byte(id):
        return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
    return piece.replace(SPACE, " ").encode()


def _find_id(ids: dict[str, int], text: str, otherwise: int, what: str) -> int:
    if text and text not in ids:
        raise UserError(f"{what} {text!r} is not in the vocabulary; name a token that is")
    id = ids[text] if text else otherwise
    if id < 0:
        raise UserError(f"{what}: the model has none; train it with BOS and EOS")
    return id
