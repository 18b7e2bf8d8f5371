"""Loads a tokenizer of any kind from its file or folder."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jllama.errors import UserError
from jllama.files import storage
from jllama.files.runs import RECIPE, run_and_step
from jllama.progress import note
from jllama.text.huggingface import HuggingFaceTokenizer
from jllama.text.infill import PIECES
from jllama.text.interface import Tokenizer
from jllama.text.llama3 import TiktokenTokenizer, is_tiktoken
from jllama.text.settings import SETTINGS_FILES, TokenizerSettings, load_settings
from jllama.text.spm import SentencePieceTokenizer
from jllama.text.tokenizer_json import affixes, spell, token_ids

_MODEL, _JSON = "tokenizer.model", "tokenizer.json"
# The files of a folder that make its tokenizer, or that only other programs read.
FILES = (_MODEL, _JSON, *SETTINGS_FILES)
_NO_SETTINGS = TokenizerSettings()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer from its file, or from a folder that holds it and its settings.

    `path` may be a URL. The content of a file decides its kind: a SentencePiece model, Llama-3's
    tiktoken file or a tokenizer.json. In a folder, tokenizer.model and the tokens added to it are
    used, unless a tokenizer.json beside it gives other ids or has more tokens. A folder of Meta's,
    which has a params.json, may have its tokenizer.model one folder above, and a step of a run,
    RUN/checkpoints/STEP, has the run's.

    Raises UserError if there is no tokenizer or it is damaged.
    """
    path = tokenizer_place(path)
    if not storage.is_folder(path):
        return _from_file(path, _NO_SETTINGS)
    tokenizer = find_tokenizer(path)
    if tokenizer is None:
        raise UserError(f"{path}: no such tokenizer: neither {_MODEL} nor {_JSON} is in the folder")
    return tokenizer


def tokenizer_place(path: str | Path) -> Path:
    """Where the tokenizer of a path is: of a run's step, RUN/checkpoints/STEP, the run."""
    path = storage.path(path)
    run, _ = run_and_step(path) or (None, None)
    return run if run is not None and storage.exists(run / RECIPE) else path


def find_tokenizer(folder: Path, names: Collection[str] | None = None) -> Tokenizer | None:
    """Loads the tokenizer of a folder as `load_tokenizer` does; returns None if it has none.

    `names` are those of the folder's files, where the caller has listed them.
    """
    names = storage.listing(folder).files if names is None else names
    if _MODEL not in names and _JSON not in names:
        above = storage.absolute(folder).parent / _MODEL
        if "params.json" in names and storage.exists(above):
            return _from_file(above, _NO_SETTINGS)
        return None
    settings = load_settings(folder, names)
    if _MODEL not in names:
        return _from_file(folder / _JSON, settings)
    if _JSON in names:
        file = _parse_json(storage.read_bytes(folder / _JSON), folder / _JSON)
        settings = _as_processed(settings, file, folder / _JSON)
        plain = _from_file(folder / _MODEL, _NO_SETTINGS)
        ids = _ids(plain)
        if isinstance(plain, SentencePieceTokenizer):  # Llama 3's file takes no more tokens
            for token in settings.added:
                ids.setdefault(token.text, token.id)
        if any(ids.get(text) != id for text, id in token_ids(file, str(folder / _JSON)).items()):
            return _from_json(file, folder / _JSON, settings)
        return _checked(_from_file(folder / _MODEL, settings), file, folder / _JSON)
    return _from_file(folder / _MODEL, settings)


def _from_file(path: Path, settings: TokenizerSettings) -> Tokenizer:
    data = storage.read_bytes(path)
    if path.suffix == ".json" or data.lstrip()[:1] == b"{":
        return _from_json(_parse_json(data, path), path, settings)
    options = _options(settings)
    if is_tiktoken(data):
        tokenizer = TiktokenTokenizer(data, str(path), **options)
    else:
        options |= {"special": _special(settings), "legacy": settings.legacy}
        tokenizer = SentencePieceTokenizer(data, str(path), **options)
    return _set_carried(tokenizer, settings)


def _parse_json(data: bytes, path: Path) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON: {storage.one_line(e)}") from None


def _from_json(file: Any, path: Path, settings: TokenizerSettings) -> Tokenizer:
    token_ids(file, str(path))  # an error for any other JSON
    options = _options(_as_processed(settings, file, path))
    tokenizer = HuggingFaceTokenizer(file, str(path), special=_special(settings), **options)
    return _set_carried(_checked(tokenizer, file, path), settings)


def _as_processed(settings: TokenizerSettings, file: Any, path: Path) -> TokenizerSettings:
    """The settings with the tokens around a text that tokenizer.json's post-processor adds.

    Transformers 5 goes by it; LlamaTokenizerFast of 4 went by the keys of tokenizer_config.json.
    """
    adds = dict(zip(("bos", "eos"), map(bool, affixes(file, str(path))), strict=True))
    for role, does in adds.items():
        key = getattr(settings, f"adds_{role}")
        if key not in (None, does):
            note(
                f"{path}: its post-processor adds {'' if does else 'no '}{role.upper()} and counts,"
                f" as in transformers 5; tokenizer_config.json says add_{role}_token={key}"
            )
    return dataclasses.replace(settings, adds_bos=adds["bos"], adds_eos=adds["eos"])


def _checked(tokenizer: Tokenizer, file: Any, path: Path) -> Tokenizer:
    """The tokenizer; UserError if the post-processor adds other tokens than BOS and EOS."""
    texts = {id: text for text, id in tokenizer.special_tokens.items()}
    usual = (texts[tokenizer.bos_id],), (texts[tokenizer.eos_id],)
    for tokens, end in zip(affixes(file, str(path)), usual, strict=True):
        if tokens not in ((), end):
            raise UserError(
                f"{path}: not a tokenizer that jllama can read: its post-processor adds"
                f" {' '.join(tokens)} to a text, and can be followed only where it adds"
                f" {end[0]} or nothing"
            )
    return tokenizer


def _special(settings: TokenizerSettings) -> frozenset[str]:
    """Returns the texts of special tokens: Code Llama's model has its own as normal pieces."""
    return settings.special | {*PIECES}


def _options(settings: TokenizerSettings) -> dict[str, Any]:
    """Returns the keyword arguments that every kind of tokenizer takes."""
    names = ("added", "bos_token", "eos_token", "stop_ids")
    return {name: getattr(settings, name) for name in names} | {
        "adds_bos": settings.adds_bos is not False,
        "adds_eos": settings.adds_eos is True,
    }


def _set_carried(tokenizer: Tokenizer, settings: TokenizerSettings) -> Tokenizer:
    # transformers would make a new id for a pad token that is not in the vocabulary.
    carried = {
        key: value
        for key, value in settings.carried.items()
        if key != "pad_token" or value in tokenizer.special_tokens
    }
    if carried:
        tokenizer.carried = carried
    return tokenizer


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns text -> id of every token of a tokenizer.model, spelt as in a tokenizer.json."""
    if isinstance(tokenizer, TiktokenTokenizer):
        pieces = {spell(piece): rank for piece, rank in tokenizer.ranks.items()}
        return pieces | tokenizer.special_tokens
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return {piece: id for id, piece in enumerate(tokenizer.pieces)}
