"""The door to tokenizers: a file or a folder in, a `Tokenizer` of its kind out."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from jllama.errors import UserError
from jllama.files import storage
from jllama.text.huggingface import HuggingFaceTokenizer
from jllama.text.infill import PIECES
from jllama.text.interface import TextStream, Tokenizer
from jllama.text.llama3 import TiktokenTokenizer, is_tiktoken
from jllama.text.settings import TokenizerSettings, load_settings, parse_json
from jllama.text.spm import SentencePieceTokenizer
from jllama.text.tokenizer_json import spell, vocabulary

__all__ = [
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "TextStream",
    "TiktokenTokenizer",
    "Tokenizer",
    "load_tokenizer",
]

_MODEL, _JSON = "tokenizer.model", "tokenizer.json"
_NO_SETTINGS = TokenizerSettings()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from its file, or from a folder with its settings; URLs too.

    A file is a SentencePiece model, Llama-3's tiktoken file or a tokenizer.json, whichever its
    content is. In a folder tokenizer.model comes first, with the tokens that are added to it; a
    tokenizer.json beside it wins where it gives other ids or has more tokens. A folder of Meta's,
    with params.json, may have its tokenizer.model one folder above.

    Raises UserError if there is none, or it is damaged.
    """
    path = storage.path(path)
    if not storage.is_folder(path):
        return _from_file(path, _NO_SETTINGS)
    tokenizer = find_tokenizer(path)
    if tokenizer is None:
        raise UserError(f"{path}: no such tokenizer: neither {_MODEL} nor {_JSON} is in the folder")
    return tokenizer


def find_tokenizer(folder: Path, names: Collection[str] | None = None) -> Tokenizer | None:
    """`load_tokenizer` of a folder; None if it has none.

    `names` are those of its files, where they are known.
    """
    names = storage.names(folder) if names is None else names
    if _MODEL not in names and _JSON not in names:
        above = storage.absolute(folder).parent / _MODEL
        if "params.json" in names and storage.exists(above):
            return _from_file(above, _NO_SETTINGS)
        return None
    settings = load_settings(folder, names)
    if _MODEL not in names:
        return _from_file(folder / _JSON, settings)
    if _JSON in names:
        file = parse_json(folder / _JSON)
        plain = _from_file(folder / _MODEL, _NO_SETTINGS)
        ids = _ids(plain)
        for token in settings.added:
            ids.setdefault(token.text, token.id)
        if any(ids.get(text) != id for text, id in vocabulary(file, str(folder / _JSON)).items()):
            return _from_json(file, folder / _JSON, settings)
    return _from_file(folder / _MODEL, settings)


def _from_file(path: Path, settings: TokenizerSettings) -> Tokenizer:
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer file") from None
    if path.suffix == ".json" or data.lstrip()[:1] == b"{":
        return _from_json(parse_json(path, data), path, settings)
    if is_tiktoken(data):
        tokenizer = TiktokenTokenizer(data, str(path), **_said(settings))
    else:
        tokenizer = SentencePieceTokenizer(
            data,
            str(path),
            special=_special(settings),
            legacy=settings.legacy,
            **_said(settings),
        )
    return _carrying(tokenizer, settings)


def _from_json(file: Any, path: Path, settings: TokenizerSettings) -> Tokenizer:
    tokenizer = HuggingFaceTokenizer(file, str(path), special=_special(settings), **_said(settings))
    return _carrying(tokenizer, settings)


def _special(settings: TokenizerSettings) -> frozenset[str]:
    """Special by what the files say; and by name, as Code Llama's model has normal pieces."""
    return settings.special | {*PIECES}


def _said(settings: TokenizerSettings) -> dict[str, Any]:
    """What every kind takes of the settings."""
    names = ("added", "bos_token", "eos_token", "stop_ids")
    return {name: getattr(settings, name) for name in names}


def _carrying(tokenizer: Tokenizer, settings: TokenizerSettings) -> Tokenizer:
    # transformers would make a new id for a pad token that the vocabulary has not.
    keep = {
        key: value
        for key, value in settings.carried.items()
        if key != "pad_token" or value in tokenizer.special_tokens
    }
    if keep:
        tokenizer.carried = keep
    return tokenizer


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Every token of a tokenizer.model as a tokenizer.json spells it, text -> id."""
    if isinstance(tokenizer, TiktokenTokenizer):
        pieces = {spell(piece): rank for piece, rank in tokenizer.ranks.items()}
        return pieces | tokenizer.special_tokens
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return {piece: id for id, piece in enumerate(tokenizer.pieces)}
