"""Writes the tokenizer files of a Hugging Face folder.

tokenizer.json is for the library `tokenizers`, and so for AutoTokenizer of transformers 4 and 5.
Its ids are those of `Tokenizer.encode` with `special=True` and with the BOS and EOS that the
tokenizer adds (transformers finds special tokens in a text, too, unless it has
`split_special_tokens=True`), and its texts those of `decode`.

`tokenizers` merges pairs in the order of a list. SentencePiece and tiktoken merge the pair whose
result has the best score or rank, the leftmost first. The ids are the same, for this reason: as
long as the ends of a piece are not merged with their neighbours, the merges within it are those of
the piece alone. So in any text a piece comes from one pair only, the last merge of the piece alone,
and a list of these pairs, the best first, is exact. The exception are pieces of equal score that
overlap in a text, because a list cannot say "leftmost". `export_note` tells which tokenizers have
such pieces, as Chinese-LLaMA's, whose added pieces all have the score 0.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jllama.text.added import AddedToken
from jllama.text.interface import SPACE
from jllama.text.llama3 import PATTERN
from jllama.text.sentencepiece_model import Piece, PieceType, parse_sentencepiece
from jllama.text.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from jllama.text.tokenizer_json import spell

_UNLIMITED = int(1e30)  # transformers' own number for "no limit"


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files' contents by name: tokenizer.json among them, if it would give the same ids."""
    file = _tokenizer_json(tokenizer)[0]
    texts = {id: text for text, id in tokenizer.special_tokens.items()}
    names = {"bos_token": texts[tokenizer.bos_id], "eos_token": texts[tokenizer.eos_id]}
    if unk := _unknown(tokenizer, file):
        names["unk_token"] = unk
    if "pad_token" in tokenizer.carried:
        names["pad_token"] = tokenizer.carried["pad_token"]
    elif isinstance(tokenizer, SentencePieceTokenizer):
        pad = parse_sentencepiece(tokenizer.model).pad_id
        if pad is not None:
            names["pad_token"] = tokenizer.pieces[pad]
    added = file.get("added_tokens") or () if file else _listed(tokenizer.added)
    config = {
        # This class takes tokenizer.json as it is in both versions; LlamaTokenizer of 5 does not.
        "tokenizer_class": "PreTrainedTokenizerFast" if file else "LlamaTokenizer",
        **names,
        **tokenizer.carried,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": _UNLIMITED,
        "added_tokens_decoder": {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added
        },
    }
    files = {} if file is None else {"tokenizer.json": _json(file)}
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        config |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": tokenizer.adds_eos}
    if isinstance(tokenizer, SentencePieceTokenizer):
        config["legacy"] = tokenizer.legacy
        files["tokenizer.model"] = tokenizer.model
    return files | {
        "tokenizer_config.json": _json(config, indent=2),
        "special_tokens_map.json": _json(names, indent=2),
    }


@functools.lru_cache(maxsize=1)  # takes seconds, and is called for the files and for the note
def _tokenizer_json(tokenizer: Tokenizer) -> tuple[dict[str, Any] | None, str]:
    """The content of tokenizer.json; None and the reason where it would give other ids."""
    try:
        match tokenizer:
            case SentencePieceTokenizer():
                return _sentencepiece(tokenizer), ""
            case TiktokenTokenizer():
                return _tiktoken(tokenizer), ""
            case HuggingFaceTokenizer():
                return _huggingface(tokenizer), ""
    except _InexpressibleError as e:
        return None, str(e)
    raise TypeError(tokenizer)


def export_note(tokenizer: Tokenizer) -> str | None:
    """A line for the user where transformers may give other ids than this tokenizer, or None."""
    file, reason = _tokenizer_json(tokenizer)
    if file is not None:
        return _ties(tokenizer)
    return (
        f"tokenizer: no tokenizer.json, because it would not give the same ids: the model"
        f" {reason}; LlamaTokenizer of transformers 4 reads tokenizer.model itself, and later"
        " versions convert it in their own way"
    )


def _unknown(tokenizer: Tokenizer, file: dict[str, Any] | None) -> str | None:
    if file is not None:
        return file["model"].get("unk_token")
    pieces = parse_sentencepiece(tokenizer.model).pieces
    return next((piece.text for piece in pieces if piece.type == PieceType.UNKNOWN), None)


def _json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=indent).encode() + b"\n"


def _file(
    tokenizer: Tokenizer, added: Iterable[AddedToken], model: dict[str, Any], **steps: Any
) -> dict[str, Any]:
    """The content of tokenizer.json: a BPE model with `steps` around it, and BOS and EOS around a
    text as the tokenizer adds them.
    """
    texts = {id: text for text, id in tokenizer.special_tokens.items()}
    before = [tokenizer.bos_id] if tokenizer.adds_bos else []
    after = [tokenizer.eos_id] if tokenizer.adds_eos else []

    def sequence(*types: int) -> list[dict]:
        parts = []
        for name, type in zip("AB", types, strict=False):
            parts += [{"SpecialToken": {"id": texts[id], "type_id": type}} for id in before]
            parts.append({"Sequence": {"id": name, "type_id": type}})
            parts += [{"SpecialToken": {"id": texts[id], "type_id": type}} for id in after]
        return parts

    template = {
        "type": "TemplateProcessing",
        "single": sequence(0),
        "pair": sequence(0, 1),
        "special_tokens": {
            texts[id]: {"id": texts[id], "ids": [id], "tokens": [texts[id]]}
            for id in (*before, *after)
        },
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _listed(added),
        "normalizer": steps.get("normalizer"),
        "pre_tokenizer": steps.get("pre_tokenizer"),
        "post_processor": template,
        "decoder": steps["decoder"],
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": False,
            "ignore_merges": False,
            **model,
        },
    }


def _specials(tokenizer: Tokenizer) -> dict[int, AddedToken]:
    return {id: AddedToken(text, id) for text, id in tokenizer.special_tokens.items()}


def _listed(added: Iterable[AddedToken]) -> list[dict[str, Any]]:
    return [{"id": t.id, **t.to_json()} for t in sorted(added, key=lambda token: token.id)]


# ------------------------------------------------------------------------------------------ merges


def _merges(cost: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """The pair that makes each piece, the cheapest piece first, and the longest of equal costs.

    With the longest first, the leftmost piece grows before another one begins. This is right for
    runs of one character, such as LLaMA's spaces, whose pieces all have the same score.
    """
    for piece in sorted(cost, key=lambda piece: (cost[piece], -len(piece))):
        parts = list(piece)
        costs = [cost.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
        while len(parts) > 2 and (best := min(costs)) < math.inf:
            at = costs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            del costs[at]
            for i in range(max(at - 1, 0), min(at + 1, len(costs))):
                costs[i] = cost.get(parts[i] + parts[i + 1], math.inf)
        if len(parts) == 2:
            yield parts[0], parts[1]


# ----------------------------------------------------------------------------------- SentencePiece


class _InexpressibleError(Exception):
    """A tokenizer.json would not give the same ids; the text says why, of the model."""


def _ties(tokenizer: Tokenizer) -> str | None:
    """What to say of pieces of equal score, or None."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    _, cost = _model(parse_sentencepiece(tokenizer.model).pieces)
    groups: dict[float, set[str]] = {}
    for piece, score in cost.items():
        letters = piece[0] if piece == piece[0] * len(piece) else piece
        groups.setdefault(score, set()).add(letters)
    tied = sum(len(group) for group in groups.values() if len(group) > 1)
    if not tied:
        return None
    return (
        f"tokenizer.json: {tied} pieces share their score with another; where two of them overlap"
        " in a text, `tokenizers` cannot take the leftmost as SentencePiece does; LlamaTokenizer of"
        " transformers 4 can, from tokenizer.model"
    )


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    model = parse_sentencepiece(tokenizer.model)
    pieces, prefix = model.pieces, model.add_dummy_prefix
    if model.algorithm != "bpe":
        raise _InexpressibleError("is not of type BPE")
    if model.charsmap:
        raise _InexpressibleError("normalises characters")
    if not model.marks_before:
        raise _InexpressibleError("does not mark spaces before the word")
    types = {piece.type for piece in pieces}
    if PieceType.UNUSED in types:
        raise _InexpressibleError("has unused pieces")
    if prefix and PieceType.USER_DEFINED in types:
        raise _InexpressibleError("has user-defined pieces, and puts a space before texts")
    if model.remove_extra_whitespaces and PieceType.USER_DEFINED in types:
        raise _InexpressibleError("has user-defined pieces, and removes extra spaces around them")
    vocab, cost = _model(pieces)
    added = _specials(tokenizer)
    for id, piece in enumerate(pieces):
        if piece.type == PieceType.USER_DEFINED and id not in added:
            # SentencePiece, too, looks for it after spaces are marked.
            added[id] = AddedToken(piece.text, id, special=False, normalized=True)
    for token in tokenizer.added:
        added[token.id] = dataclasses.replace(token, normalized=False)
        vocab[token.text] = token.id  # else `tokenizers` gives it the id after the last
    unk = next(piece.text for piece in pieces if piece.type == PieceType.UNKNOWN)
    normalizers = []
    if model.remove_extra_whitespaces:  # spaces alone, not line breaks
        # At the end SentencePiece takes its own mark for one.
        normalizers.append(_replace(rf"\A +|[ {SPACE}]+\z", ""))
        normalizers.append(_replace(" {2,}", " "))
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    first = None
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        if tokenizer.legacy:
            normalizers.append({"type": "Prepend", "prepend": SPACE})
            visible = [re.escape(t.text) for t in added.values() if not t.special]
            if visible:  # the text after each one begins with a space
                decoders.append(_replace(f"(?<={'|'.join(visible)}) ", ""))
        else:
            # This Metaspace meets no spaces, for they are marked already; it only adds the first.
            space = {"type": "Metaspace", "split": False}
            first = {
                "type": "Sequence",
                "pretokenizers": [
                    {**space, "replacement": " ", "prepend_scheme": "first"},
                    {**space, "replacement": SPACE, "prepend_scheme": "never"},
                ],
            }
    return _file(
        tokenizer,
        added.values(),
        {
            "unk_token": unk,
            "byte_fallback": PieceType.BYTE in types,
            "vocab": vocab,
            "merges": [list(pair) for pair in _merges(cost) if all(part in vocab for part in pair)],
        },
        normalizer={"type": "Sequence", "normalizers": [*normalizers, mark]}
        if normalizers
        else mark,
        pre_tokenizer=first,
        decoder={"type": "Sequence", "decoders": decoders},
    )


def _replace(pattern: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": by}


def _model(pieces: Sequence[Piece]) -> tuple[dict[str, int], dict[str, float]]:
    """The id of each piece, and the cost of each piece that a merge makes."""
    vocab = {piece.text: id for id, piece in enumerate(pieces)}
    normal = [p for p in pieces if p.type == PieceType.NORMAL and len(p.text) > 1]
    return vocab, {piece.text: -piece.score for piece in normal}


# ---------------------------------------------------------------------------------------- tiktoken


def _tiktoken(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    vocab = {spell(piece): rank for piece, rank in tokenizer.ranks.items()}
    cut = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    as_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    cost = {token: rank for token, rank in vocab.items() if len(token) > 1}
    return _file(
        tokenizer,
        _specials(tokenizer).values(),
        {
            "ignore_merges": True,  # a word that is a piece becomes that piece
            "vocab": vocab,
            "merges": [list(pair) for pair in _merges(cost)],
        },
        pre_tokenizer={"type": "Sequence", "pretokenizers": [cut, as_bytes]},
        decoder=as_bytes,
    )


# ----------------------------------------------------------------------------------- tokenizer.json


def _huggingface(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    """The tokenizer.json that was read, with the tokens that other files of its folder add."""
    file, model = tokenizer.json, tokenizer.json["model"]
    listed = {t["content"]: t.get("special", False) for t in file.get("added_tokens") or ()}
    added = _specials(tokenizer) | {token.id: token for token in tokenizer.added}
    if listed == {token.text: token.special for token in added.values()}:
        return file
    # A token that is not in the vocabulary would get the id after the last.
    vocab = model["vocab"] | {t.text: t.id for t in tokenizer.added if t.text not in listed}
    return file | {"added_tokens": _listed(added.values()), "model": model | {"vocab": vocab}}
