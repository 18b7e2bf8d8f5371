"""Dotted overrides: `data.train.0.weight=2` sets one value among the nested values of a recipe."""

import re
import types
from collections.abc import Sequence
from typing import Any

from jllama.config import schema
from jllama.config.plain_yaml import parse_yaml
from jllama.errors import UserError


def override(data: dict, overrides: Sequence[str], cls: type | None = None) -> dict:
    """Sets every `key=value` in `data`, in place and before validation, and returns `data`.

    The value of a key that is text in the config `cls` is taken as it stands, except that null is
    no text where there may be none. Any other value is YAML, except that plain text is taken as it
    stands. A number in the key is the index of a list's item. A new `kind` removes the keys beside
    it that no earlier override has set. A member of a sum type that no key has named before is of
    the kind that is the default. Raises UserError, naming the key.
    """
    assigned: set[str] = set()
    made: dict[str, dict] = {}
    for item in overrides:
        key, eq, text = item.partition("=")
        if not eq or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
            raise UserError(f"{item!r}: an override is written key=value, with dots inside the key")
        kinds = schema.value_types(cls, key) if cls else set()
        try:
            if str in kinds and kinds <= {str, types.NoneType}:
                value = None if text == "null" and len(kinds) > 1 else text
            else:
                value = _parse_value(text)
        except ValueError as e:
            raise UserError(f"{key}: {text!r} is not a YAML value: {e}") from None
        _assign(data, key, value, assigned, made)
        assigned.add(key)
    for path, node in made.items():
        if cls and "kind" not in node and (kind := schema.default_kind(cls, path, node)):
            node["kind"] = kind
    return data


def _parse_value(text: str) -> Any:
    if not text:
        return text  # YAML reads nothing as null
    value = parse_yaml(text)
    # YAML would drop the spaces around plain text, and what follows " #".
    quoted = text.lstrip().startswith(("'", '"', "|", ">", "&", "!"))
    return text if isinstance(value, str) and not quoted else value


def _assign(data: dict, key: str, value: Any, assigned: set[str], made: dict[str, dict]) -> None:
    """Sets the value, and makes the keys above it that are missing: `made` has them by path."""
    node: Any = data
    *parents, last = key.split(".")
    for i, name in enumerate(parents):
        path = ".".join(parents[: i + 1])
        if isinstance(node, list):
            node = node[_index(node, name, path)]
        else:
            if node.get(name) is None:
                node[name] = made[path] = {}
            node = node[name]
        if not isinstance(node, (dict, list)):
            raise UserError(f"{key}: {path} is a single value, without keys")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif last == "kind" and node.get("kind") != value:
        # The keys of the old member of a sum type mean nothing in the new one; those that an
        # earlier override has set are meant for the new one.
        remaining = {k: v for k, v in node.items() if ".".join([*parents, k]) in assigned}
        node.clear()
        node |= remaining | {"kind": value}
    else:
        node[last] = value


def _index(items: list, name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise UserError(f"{key}: a list of {len(items)} takes an index below {len(items)}")
    return int(name)
