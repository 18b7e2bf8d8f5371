"""Reads the settings of a tokenizer from the files beside it in a Hugging Face folder."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jllama.errors import UserError
from jllama.files import storage
from jllama.text.added import AddedToken
from jllama.text.keys import GENERATION, note_tokenizer_keys

_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_ADDED, _GENERATION = "added_tokens.json", GENERATION
_MODEL = "config.json"  # has eos_token_id too, which counts where _GENERATION has none
_TEMPLATE = "chat_template.jinja"  # before transformers 4.52 in tokenizer_config.json
SETTINGS_FILES = (_CONFIG, _MAP, _ADDED, _GENERATION, _TEMPLATE)
_ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """The settings that the files of a folder give; the others have their defaults.

    Attributes:
      bos_token, eos_token: texts of the tokens that begin and end a text.
      added: tokens beside the vocabulary, with their ids.
      special: texts of special tokens, in the vocabulary or added.
      legacy: whether a SentencePiece vocabulary adds a space after an added token.
      stop_ids: ids that end a generated text.
      adds_bos, adds_eos: whether texts begin with BOS, and end with EOS; None where no key says.
      carried: chat_template, pad_token and padding_side, which only other programs use.
    """

    bos_token: str = ""
    eos_token: str = ""
    added: tuple[AddedToken, ...] = ()
    special: frozenset[str] = frozenset()
    legacy: bool = True
    stop_ids: tuple[int, ...] = ()
    adds_bos: bool | None = None
    adds_eos: bool | None = None
    carried: Mapping[str, str] = dataclasses.field(default_factory=dict)


def load_settings(folder: Path, names: Collection[str]) -> TokenizerSettings:
    """Reads the settings of a folder. Raises UserError if one of its files is damaged.

    `names` are those of its files.
    """
    files = {
        name: storage.read_json(folder / name) if name in names else {}
        for name in (_CONFIG, _MAP, _ADDED, _GENERATION)
    }
    config, roles = files[_CONFIG], files[_MAP]
    name = _CONFIG  # the file that is being read
    try:
        named = {key: _text(config.get(f"{key}_token")) for key in _ROLES}
        special = {*named.values(), *_additional_tokens(config)}
        added = [
            AddedToken.from_json(value, int(id))  # JSON has the ids as texts
            for id, value in (config.get("added_tokens_decoder") or {}).items()
        ]
        name = _MAP
        for key in _ROLES:
            text = _text(roles.get(f"{key}_token"))
            named[key] = named[key] or text
            special.add(text)
        special |= set(_additional_tokens(roles))
        name = _ADDED
        known = {token.text for token in added}
        for text, id in files[_ADDED].items():
            if text not in known:
                added.append(AddedToken.from_json({"content": text}, id))
        adds_bos, adds_eos = _flag(config, "add_bos_token"), _flag(config, "add_eos_token")
        name = _GENERATION
        stops = files[_GENERATION].get("eos_token_id")
        if stops is None and _MODEL in names:
            name = _MODEL
            stops = storage.read_json(folder / _MODEL).get("eos_token_id")
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        if not all(type(id) is int for id in stops):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder / name}: not as Hugging Face writes it: a token is a text or an object with"
            " content, an id is a whole number, add_bos_token and add_eos_token are true or false"
        ) from None
    note_tokenizer_keys(folder / _CONFIG, config, [f"{role}_token" for role in _ROLES])
    special |= {token.text for token in added if token.special}
    carried = {
        "chat_template": storage.read_text(folder / _TEMPLATE)
        if _TEMPLATE in names
        else config.get("chat_template"),
        "pad_token": named["pad"],
        "padding_side": config.get("padding_side"),
    }
    return TokenizerSettings(
        bos_token=named["bos"],
        eos_token=named["eos"],
        added=tuple(sorted(added, key=lambda token: token.id)),
        special=frozenset(special - {""}),
        legacy=config.get("legacy") is not False,
        stop_ids=tuple(sorted(set(stops))),
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        carried={key: value for key, value in carried.items() if value and type(value) is str},
    )


def _text(token: Any) -> str:
    """Returns the text of a token that is written as a text or an object; empty for none."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise TypeError
    return text or ""


def _flag(file: dict, key: str) -> bool | None:
    value = file.get(key)
    if not isinstance(value, bool | None):
        raise TypeError
    return value


def _additional_tokens(file: dict) -> Iterator[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = file.get(key) or []
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            yield _text(token)
