"""What the files beside a tokenizer say of it, in a Hugging Face folder."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jllama.errors import UserError
from jllama.files import storage
from jllama.text.added import AddedToken

_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_ADDED, _GENERATION = "added_tokens.json", "generation_config.json"
_TEMPLATE = "chat_template.jinja"  # before transformers 4.52 in tokenizer_config.json
_ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """Empty where no file says it.

    Attributes:
      bos_token, eos_token: their texts.
      added: tokens with their ids.
      special: texts of special tokens, of the vocabulary or added.
      legacy: whether a text after an added token gets a space, in a SentencePiece vocabulary.
      stop_ids: ids that end a generated text.
      carried: chat_template, pad_token and padding_side, which others read and nothing here does.
    """

    bos_token: str = ""
    eos_token: str = ""
    added: tuple[AddedToken, ...] = ()
    special: frozenset[str] = frozenset()
    legacy: bool = True
    stop_ids: tuple[int, ...] = ()
    carried: Mapping[str, str] = dataclasses.field(default_factory=dict)


def load_settings(folder: Path, names: Collection[str]) -> TokenizerSettings:
    """The folder's settings; those of files that are not there are empty. UserError if damaged."""
    files = {
        name: parse_json(folder / name) if name in names else {}
        for name in (_CONFIG, _MAP, _ADDED, _GENERATION)
    }
    config, roles = files[_CONFIG], files[_MAP]
    for name, value in files.items():
        if not isinstance(value, dict):
            raise UserError(f"{folder / name}: not a JSON object")
    at = _CONFIG  # the file that is being read
    try:
        named = {key: _text(config.get(f"{key}_token")) for key in _ROLES}
        special = {*named.values(), *_more(config)}
        added = [
            AddedToken.from_json(value, int(id))  # its keys are texts
            for id, value in (config.get("added_tokens_decoder") or {}).items()
        ]
        at = _MAP
        for key in _ROLES:
            text = _text(roles.get(f"{key}_token"))
            named[key] = named[key] or text
            special.add(text)
        special |= set(_more(roles))
        at = _ADDED
        known = {token.text for token in added}
        for text, id in files[_ADDED].items():
            if text not in known:
                added.append(AddedToken.from_json({"content": text}, id))
        at = _GENERATION
        stops = files[_GENERATION].get("eos_token_id")
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        if not all(type(id) is int for id in stops):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder / at}: not as Hugging Face writes it: tokens are texts or objects with"
            " content, ids are whole numbers"
        ) from None
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
        carried={key: value for key, value in carried.items() if value and type(value) is str},
    )


def parse_json(file: Path, data: bytes | None = None) -> Any:
    """A file of JSON, whose bytes are `data` if they are read already. UserError if it is not."""
    try:
        return json.loads(storage.read_bytes(file) if data is None else data)
    except ValueError as e:  # not UTF-8, too
        raise UserError(f"{file}: not JSON: {e}") from None
    except RecursionError:
        raise UserError(f"{file}: not JSON: nested too deeply") from None


def _text(token: Any) -> str:
    """A token's text, from a text or an object; empty for none."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise TypeError
    return text or ""


def _more(file: dict) -> Iterator[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = file.get(key) or []
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            yield _text(token)
