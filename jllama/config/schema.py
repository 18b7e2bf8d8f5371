"""Describes the keys of the config dataclasses, and explains validation errors in one line.

Both walk the type hints: dataclasses, tuples of them, and sum types whose members have a `kind`.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal

import pydantic

from jllama.config.base import Options
from jllama.config.suggestions import meant_key

_MISSING = ("missing", "missing_argument")
_MAX_KEYS = 8  # in one line


def explain(cls: type, error: pydantic.ValidationError) -> tuple[list[str], str]:
    """Returns the keys of the likeliest mistake, and what is wrong with them."""
    # A list with a bad item also counts as too short; only the error of the item is reported.
    inside = {e["loc"][:i] for e in error.errors() for i in range(len(e["loc"]))}
    errors = [e for e in error.errors() if e["loc"] not in inside]
    # An unknown key is the likeliest mistake, and likely causes the other errors.
    errors.sort(key=lambda e: e["type"] != "unexpected_keyword_argument")
    first = errors[0]
    path, allowed, tags = _walk(cls, first["loc"])
    keys = [".".join(path) or "config"]
    kind = first["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = {key: meaning for key, _, meaning in describe_keys(cls)}
        hint = meant_key(path, allowed, known)
        text = f"unknown key; {hint}allowed: {', '.join(allowed)}"
    elif kind in _MISSING:
        absent = [e["loc"] for e in errors if e["type"] in _MISSING][:_MAX_KEYS]
        keys = [".".join(_walk(cls, loc)[0]) for loc in absent]
        text = f"{'is' if len(keys) == 1 else 'are'} required and missing"
    elif kind == "union_tag_not_found":
        text = f"needs a kind; allowed: {', '.join(map(repr, tags))}"
    elif kind == "union_tag_invalid":
        text = f"kind {first['ctx']['tag']!r} is unknown; allowed: {first['ctx']['expected_tags']}"
    elif kind == "value_error":
        text = str(first["ctx"]["error"])
    else:
        text = first["msg"][0].lower() + first["msg"][1:] + f", not {json.dumps(first['input'])}"
        if kind == "tuple_type":
            text = text.replace("valid array", "list", 1)
            match first["input"]:
                case str(item):
                    text += f"; write '{json.dumps([item])}'"
                case dict(items) if all(key.isdigit() for key in items):
                    text += (
                        f"; the list does not exist yet: write '{json.dumps(list(items.values()))}'"
                    )
        if kind == "string_type" and not isinstance(first["input"], dict | list):
            text += "; put text that YAML reads as something else in double quotes"
    others = len(errors) - len(keys)
    return keys, text + (f" (and {others} more)" if others else "")


def _walk(cls: Any, loc: Sequence[str | int]) -> tuple[list[str], list[str], list[str]]:
    """Follows pydantic's location of an error.

    Returns the location without the tags of sum types, and the keys and kinds allowed there.
    """
    path: list[str] = []
    allowed: list[str] = []
    hint = cls
    for part in loc:
        member = _tagged(hint, part)
        if member is not None:
            hint = member
            continue
        path.append(str(part))
        hints = {k: h for m in _members(hint) for k, h in _keys(m).items()}
        allowed = list(hints) or allowed
        hint = hints.get(part, hint)
    return path, allowed, [t for m in _members(hint) if (t := _tag(m))]


def _tagged(hint: Any, part: str | int) -> Any:
    """Returns the member of a sum type that pydantic calls `part`, or None."""
    for option in typing.get_args(_strip(hint)):
        if part in [mark.tag for mark in typing.get_args(option) if isinstance(mark, pydantic.Tag)]:
            return option
    members = _members(hint)
    return next((m for m in members if _tag(m) == part), None) if len(members) > 1 else None


def _keys(cls: type) -> dict[str, Any]:
    """Returns the type hint of every key; the key is a field's alias where Python needs another."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.default.alias or f.name: hints[f.name] for f in dataclasses.fields(cls)}


def value_types(cls: type, key: str) -> set[Any]:
    """The types that a dotted key may have: those of a union, and of all members of a sum type."""
    hints: list[Any] = [cls]
    for part in key.split("."):
        inner = []
        for option in _options(hints):
            if dataclasses.is_dataclass(option):
                inner.append(_keys(option).get(part))
            elif typing.get_origin(option) is tuple and part.isdecimal():
                inner.append(typing.get_args(option)[0])
        hints = [hint for hint in inner if hint is not None]
    return set(_options(hints))


def default_kind(cls: type, key: str, keys: Collection[str]) -> str | None:
    """The kind of the member that a dotted key has by default, if that member has all of `keys`."""
    parent, _, last = key.rpartition(".")
    for owner in value_types(cls, parent) if parent else {cls}:
        fields = dataclasses.fields(owner) if dataclasses.is_dataclass(owner) else ()
        for field in fields:
            member = getattr(field.default, "default", None)  # pydantic keeps its FieldInfo here
            if field.name != last or not dataclasses.is_dataclass(member):
                continue
            if set(keys) <= {f.name for f in dataclasses.fields(member)}:
                return getattr(member, "kind", None)
    return None


def _options(hints: Sequence[Any]) -> list[Any]:
    """The hints without annotations, and the members of a union for the union."""
    options = []
    for hint in map(_strip, hints):
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            options += _options(typing.get_args(hint))
        else:
            options.append(hint)
    return options


def _strip(hint: Any) -> Any:
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return hint


def _members(hint: Any) -> tuple[type, ...]:
    """Returns the dataclasses in a type hint: itself, a union's members, or a tuple's items."""
    hint = _strip(hint)
    if dataclasses.is_dataclass(hint):
        return (hint,)
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        return tuple(m for a in typing.get_args(hint) if a is not Ellipsis for m in _members(a))
    return ()


def _tag(cls: type) -> str | None:
    kind = typing.get_type_hints(cls).get("kind")
    return typing.get_args(kind)[0] if kind is not None else None


def describe_keys(cls: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """Returns (dotted key, type, meaning with its default) of every key of a config."""
    rows = []
    for field, (name, hint) in zip(dataclasses.fields(cls), _keys(cls).items(), strict=True):
        key = prefix + name
        info = field.default  # pydantic keeps its FieldInfo here
        meaning = info.description
        members = _beneath(hint, key)
        if not members:
            if not info.is_required():
                meaning += f" [{pydantic.TypeAdapter(hint).dump_json(info.default).decode()}]"
            rows.append((key, _type_name(hint), meaning))
            continue
        rows.append((key, " | ".join(dict.fromkeys(form for _, _, form in members)), meaning))
        for member, inner, _ in members:
            tag = _tag(member)
            for k, t, m in describe_keys(member, inner):
                rows.append((k, t, f"({tag}) {m}" if len(members) > 1 and tag else m))
    return rows


def _beneath(hint: Any, key: str) -> list[tuple[type, str, str]]:
    """Returns (dataclass, prefix of its keys, name of the form) of all that a key may hold."""
    result = []
    for option in _options([hint]):
        is_list = typing.get_origin(option) is tuple
        for member in _members(option):
            prefix = f"{key}.0." if is_list else f"{key}."
            result.append((member, prefix, "list" if is_list else _tag(member) or "keys"))
    return result


def _type_name(hint: Any) -> str:
    hint = _strip(hint)
    if typing.get_origin(hint) is Literal:
        return "|".join(str(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        names = [_type_name(a) for a in typing.get_args(hint)]
        return "|".join(names)
    if typing.get_origin(hint) is tuple:
        return "options" if hint == _strip(Options) else "list"
    return {type(None): "null"}.get(hint, getattr(hint, "__name__", str(hint)))
