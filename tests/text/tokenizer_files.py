"""Files of tokenizers, and a reference that reads them with Hugging Face's `tokenizers`."""

import base64
import json

import tokenizers

KINDS = ["trained", "spm", "llama3", "json_bytes", "json_prepend", "json_first", "json_always"]


def tiktoken_file(ranks: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(p) + b" %d\n" % i for i, p in enumerate(ranks))


def merges(rank: dict[str, float]) -> list[list[str]]:
    """Returns every pair of pieces that makes a piece, by rank, as Hugging Face converts them."""
    pairs = [
        (rank[piece], -i, i - len(piece), piece[:i], piece[i:])
        for piece in rank
        for i in range(1, len(piece))
        if piece[:i] in rank and piece[i:] in rank
    ]
    return [[left, right] for *_, left, right in sorted(pairs)]


def added(text: str, id: int, **flags) -> dict:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = dict.fromkeys(names, False) | {"special": True} | flags
    return {"id": id, "content": text} | flags


def metaspace(file: dict, scheme: str) -> dict:
    """Returns the file with a pre-tokeniser, instead of the normaliser, that adds the space."""
    step = {"type": "Metaspace", "replacement": "\u2581", "split": False}
    return file | {"normalizer": None, "pre_tokenizer": step | {"prepend_scheme": scheme}}


def marked(file: dict) -> dict:
    """Returns the file with a normaliser that marks spaces, and two pre-tokenisers."""
    space = {"type": "Metaspace", "split": False}
    first = space | {"replacement": " ", "prepend_scheme": "first"}
    second = space | {"replacement": "\u2581", "prepend_scheme": "never"}
    return file | {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [first, second]},
    }


def doubled(file: dict) -> dict:
    """Returns the file as transformers 5.24 writes it for LlamaTokenizer."""
    space = {"type": "Metaspace", "replacement": "\u2581", "split": False}
    steps = [
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        {"type": "Replace", "pattern": {"Regex": "\\A\u2581"}, "content": "\u2581\u2581"},
    ]
    return file | {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [space | {"prepend_scheme": "always"}],
        },
    }


def peer(file: dict, special: bool = False) -> tokenizers.Tokenizer:
    """Returns the tokenizer of `tokenizers`; it encodes special tokens in text if `special`."""
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(file))
    tokenizer.encode_special_tokens = not special
    return tokenizer


def ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def template(before: dict[str, int], after: dict[str, int] | None = None) -> dict:
    """A post-processor that puts these tokens, with their ids, before and after a text."""
    after = after or {}
    tokens = before | after

    def special(token):
        return {"SpecialToken": {"id": token, "type_id": 0}}

    single = [*map(special, before), {"Sequence": {"id": "A", "type_id": 0}}, *map(special, after)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {t: {"id": t, "ids": [id], "tokens": [t]} for t, id in tokens.items()},
    }
