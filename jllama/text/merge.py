"""A vocabulary appended to another, as Chinese-LLaMA's was (arXiv:2304.08177, section 2.1).

Every id of the base stays. The pieces that it lacks follow with the score 0, above all of the
base's: where a merge of two pieces makes one of them, BPE takes it first.
"""

import dataclasses
import functools
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

# Types of model whose pieces can be results of BPE's merges.
_APPENDED = ("bpe", "unigram", "char")


@dataclasses.dataclass(frozen=True)
class Merged:
    """A vocabulary made of two.

    Attributes:
      tokenizer: the base's, with more pieces.
      base, appended, specials: pieces of each origin; the ids are in this order.
      unreachable: of those appended, how many no merge of two pieces makes: they are in no text.
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
    """Appends the ordinary pieces of `new`, if any, that `base` lacks; `specials`; and `pad`.

    Pieces of `new` that stand for one byte, are cut out of a text before it is encoded
    (user-defined), or are special by name, as Code Llama's for infilling, are no words, and are
    left out.

    Args:
      specials: texts of control tokens, which are never made from text.
      pad: one that is the model's padding too.
      names: of the two, for errors.

    Raises UserError if `base` is no SentencePiece BPE model, `new` has pieces that BPE cannot make,
    or a special token is a piece already.
    """
    old = _sentencepiece(base, names[0])
    other = _sentencepiece(new, names[1]) if new is not None else old
    _check_types(old, other, names)
    if base.added_tokens:
        token, id = next(iter(base.added_tokens.items()))
        raise UserError(
            f"{names[0]}: its folder adds tokens to the model ({token!r} has the id {id}), where"
            " new pieces would go; give the tokenizer.model alone, and such tokens by --special"
        )
    known = {piece.text for piece in old.pieces}
    left_out = known | (new or base).special_tokens.keys()
    more = [
        Piece(piece.text, 0.0, PieceType.NORMAL)
        for piece in other.pieces
        if piece.type == PieceType.NORMAL and piece.text not in left_out
    ]
    known |= {piece.text for piece in more}
    control = [*specials, *([pad] if pad else [])]
    for text in control:
        if text in known or not text or not text.isprintable():
            why = "is a piece already, or given twice" if text in known else "is not printable"
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
    lost = sum(
        spelt != [start + i]
        for i, spelt in enumerate(_alone(tokenizer, tokenizer, start, len(more)))
    )
    return Merged(tokenizer, start, len(more), len(marks), lost)


def _sentencepiece(tokenizer: Tokenizer, name: str) -> SentencePieceModel:
    if not isinstance(tokenizer, SentencePieceTokenizer):
        kind = type(tokenizer).__name__.removesuffix("Tokenizer")
        raise UserError(
            f"{name}: a {kind} tokenizer, and vocabularies merge as SentencePiece models alone;"
            " give a tokenizer.model of that type"
        )
    return parse_sentencepiece(tokenizer.model)


def _check_types(base: SentencePieceModel, new: SentencePieceModel, names: tuple[str, str]) -> None:
    if base.algorithm != "bpe":
        raise UserError(
            f"{names[0]}: a SentencePiece model of type {base.algorithm}: pieces appended with"
            " score 0 would win in every text there; the base must be of type bpe, as LLaMA's"
        )
    if new.algorithm not in _APPENDED:
        raise UserError(
            f"{names[1]}: a SentencePiece model of type {new.algorithm}, and {names[0]} is of type"
            " bpe, which makes pieces of pieces and no whole words; train it as"
            f" {' or '.join(_APPENDED)}"
        )
    if base.marks_before != new.marks_before:
        raise UserError(
            f"{names[0]} and {names[1]} mark spaces on different sides of a word: no piece of one"
            " fits the other; train NEW with treat_whitespace_as_suffix as BASE has it"
        )


def _alone(by: Tokenizer, tokenizer: Tokenizer, start: int, count: int) -> list[list[int]]:
    """Ids, by one tokenizer, of the texts of another's `count` pieces from `start` on.

    No space is put before them. A special token, or a part of a character, has none.
    """
    out = []
    for piece in tokenizer._bytes[start : start + count]:
        try:
            out.append(by._encode(piece.decode(), prefix=False) if piece else [])
        except UnicodeDecodeError:
            out.append([])
    return out


def spell_new_ids(base: Tokenizer, grown: Tokenizer) -> list[list[int]]:
    """For each id that `grown` has beyond `base`, the base's ids of its text; [] for none.

    Special tokens have no text. Raises UserError unless `grown` keeps every id of `base`.
    """
    count = grown.vocab_size - base.vocab_size
    if count < 0:
        raise UserError(
            f"the tokenizer has {grown.vocab_size:,} ids and the model's own {base.vocab_size:,}:"
            " a vocabulary grows, and never shrinks; give one that was merged with the model's own"
        )
    ids = range(base.vocab_size)
    names = [{id: text for text, id in t.special_tokens.items()} for t in (base, grown)]
    for id in ids:
        was, now = ((n.get(id), t._bytes[id]) for n, t in zip(names, (base, grown), strict=True))
        if was != now:
            was, now = (text or data.decode(errors="replace") for text, data in (was, now))
            raise UserError(
                f"the tokenizer's id {id} is {now!r}, and {was!r} in the model's own: it keeps not"
                " all ids; make it from the model's own (jllama vocabulary merge)"
            )
    return _alone(base, grown, base.vocab_size, count)
