"""Appends one vocabulary to another, as Chinese-LLaMA does (arXiv:2304.08177, section 2.1).

The base keeps all its ids. The pieces that it lacks follow with the score 0, which is above every
score of the base, so BPE prefers a merge of two pieces that makes an appended one.
"""

import dataclasses
import functools
import shlex
from collections.abc import Sequence

from jllama.errors import UserError
from jllama.text.interface import Tokenizer
from jllama.text.sentencepiece_model import (
    Piece,
    PieceType,
    SentencePieceModel,
    append_pieces,
    parse_sentencepiece,
)
from jllama.text.spm import SentencePieceTokenizer

# The types of model whose pieces BPE can make by merging.
_APPENDABLE = ("bpe", "unigram", "char")


@dataclasses.dataclass(frozen=True)
class Merged:
    """A vocabulary made of two.

    Attributes:
      tokenizer: the base's tokenizer with more pieces.
      base, appended, specials: the number of pieces of each origin, in the order of the ids.
      unreachable: how many appended pieces cannot be made by merging two pieces; no text is encoded
        to them.
    """

    tokenizer: SentencePieceTokenizer
    base: int
    appended: int
    specials: int
    unreachable: int


def merge_vocabularies(
    base: Tokenizer,
    new: Tokenizer | None,
    *,
    specials: Sequence[str] = (),
    pad: str = "",
    names: tuple[str, str] = ("BASE", "NEW"),
) -> Merged:
    """Appends to `base` the pieces of `new` that it lacks, then `specials`, then `pad`.

    Only ordinary pieces of `new` are appended: not those of a single byte, not user-defined ones,
    and not those that are special by name, such as Code Llama's for infilling.

    Args:
      new: the other tokenizer, or None to append only special tokens.
      specials: texts of control tokens, to which text is never encoded.
      pad: text of a control token that also becomes the model's padding; empty for none.
      names: the names of the two tokenizers, for errors.

    Raises UserError if `base` is not a SentencePiece BPE model, if `new` has pieces that BPE cannot
    make, or if a special token already is a piece.
    """
    old = _sentencepiece(base, names[0])
    other = _sentencepiece(new, names[1]) if new is not None else old
    _check_types(old, other, names)
    if base.added_tokens:
        raise UserError(_added_tokens(base, len(old.pieces), names[0]))
    known = {piece.text for piece in old.pieces}
    excluded = known | (new or base).special_tokens.keys()
    more = [
        Piece(piece.text, 0.0, PieceType.NORMAL)
        for piece in other.pieces
        if piece.type == PieceType.NORMAL and piece.text not in excluded
    ]
    known |= {piece.text for piece in more}
    control = [*specials, *([pad] if pad else [])]
    for text in control:
        if text in known or not text or not text.isprintable():
            why = "already is a piece, or is given twice" if text in known else "is not printable"
            raise UserError(
                f"special token {text!r}: {why if text else 'has no text'};"
                " choose another, or leave it out"
            )
        known.add(text)
    marks = [Piece(text, 0.0, PieceType.CONTROL) for text in control]
    make = functools.partial(SentencePieceTokenizer, **base._options)
    tokenizer = make(append_pieces(base.model, [*more, *marks], pad), names[0])
    tokenizer.carried = base.carried | ({"pad_token": pad} if pad else {})
    start = len(old.pieces)
    unreachable = sum(
        ids != [start + i]
        for i, ids in enumerate(_encode_pieces(tokenizer, tokenizer, start, len(more)))
    )
    return Merged(tokenizer, start, len(more), len(marks), unreachable)


def _added_tokens(base: SentencePieceTokenizer, pieces: int, name: str) -> str:
    """Says that a folder's added tokens are in the way of new pieces, and what to do with them."""
    added = sorted(base.added_tokens.items(), key=lambda item: item[1])
    text, id = added[0]
    options = " ".join(f"--special {shlex.quote(text)}" for text, _ in added)
    keep = [id for _, id in added] == list(range(pieces, pieces + len(added)))
    if keep and all(text in base.special_tokens for text, _ in added):
        advice = (
            "put them into the model first, where they keep their ids (jllama vocabulary merge"
            f" {shlex.quote(f'{name}/tokenizer.model')} {options} --out FILE.model), and give that"
            " as the base"
        )
    else:
        advice = (
            f"give its tokenizer.model alone and those tokens by {options}: they get other ids, for"
            " which the model has to be trained; before jllama vocabulary grow, give the model it"
            f" too: jllama convert MODEL DST --tokenizer {shlex.quote(f'{name}/tokenizer.model')}"
        )
    return (
        f"{name}: its folder adds tokens to the model ({text!r} has the id {id}), at the ids of the"
        f" new pieces; {advice}"
    )


def _sentencepiece(tokenizer: Tokenizer, name: str) -> SentencePieceModel:
    if not isinstance(tokenizer, SentencePieceTokenizer):
        kind = type(tokenizer).__name__.removesuffix("Tokenizer")
        raise UserError(
            f"{name}: a {kind} tokenizer, but only SentencePiece models can be merged; give the"
            " tokenizer.model of one"
        )
    return parse_sentencepiece(tokenizer.model)


def _check_types(base: SentencePieceModel, new: SentencePieceModel, names: tuple[str, str]) -> None:
    if base.algorithm != "bpe":
        raise UserError(
            f"{names[0]}: a SentencePiece model of type {base.algorithm}, in which appended pieces"
            " of score 0 would always win; the base must be of type bpe, as LLaMA's is"
        )
    if new.algorithm not in _APPENDABLE:
        raise UserError(
            f"{names[1]}: a SentencePiece model of type {new.algorithm}, but {names[0]} is of type"
            " bpe, which makes pieces only by merging shorter ones; train it as"
            f" {' or '.join(_APPENDABLE)}"
        )
    if base.marks_before != new.marks_before:
        raise UserError(
            f"{names[0]} and {names[1]} mark spaces on different sides of a word, so that no piece"
            " of one fits the other; train NEW with the treat_whitespace_as_suffix of BASE"
        )


def _encode_pieces(
    encoder: Tokenizer, tokenizer: Tokenizer, start: int, count: int
) -> list[list[int]]:
    """Encodes the texts of `count` pieces of `tokenizer`, from the id `start` on, with `encoder`.

    No space is added before them. A special token, or a part of a character, has no ids.
    """
    encoded = []
    for piece in tokenizer._bytes[start : start + count]:
        try:
            encoded.append(encoder._encode(piece.decode(), prefix=False) if piece else [])
        except UnicodeDecodeError:
            encoded.append([])
    return encoded


def spell_new_ids(base: Tokenizer, grown: Tokenizer) -> list[list[int]]:
    """Returns the base's ids of the text of each id that `grown` has beyond `base`.

    The list is empty for a special token, which has no text. Raises UserError if `grown` changes an
    id of `base`.
    """
    count = grown.vocab_size - base.vocab_size
    if count < 0:
        raise UserError(
            f"the tokenizer has {grown.vocab_size:,} ids and the model's own {base.vocab_size:,}:"
            " a vocabulary grows and never shrinks; give one that was merged with the model's own"
        )
    ids = range(base.vocab_size)
    names = [{id: text for text, id in t.special_tokens.items()} for t in (base, grown)]
    for id in ids:
        old, new = ((n.get(id), t._bytes[id]) for n, t in zip(names, (base, grown), strict=True))
        if old != new:
            old, new = (text or data.decode(errors="replace") for text, data in (old, new))
            raise UserError(
                f"the tokenizer's id {id} is {new!r}, but {old!r} in the model's own; make it"
                " from the model's own (jllama vocabulary merge), which keeps its ids"
            )
    return _encode_pieces(base, grown, base.vocab_size, count)
