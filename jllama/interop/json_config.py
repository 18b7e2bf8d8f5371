"""Config files of other projects, in JSON, checked by pydantic: a bad value is one line.

The line names the file, the key, the value (shortened) and what is expected.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from jllama.errors import UserError
from jllama.files import storage

LARGEST = 100_000_000  # no model has a size or a length above it
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Positive = Annotated[float, Field(gt=0)]

json_dataclass = functools.partial(
    pydantic.dataclasses.dataclass, frozen=True, kw_only=True, config={"allow_inf_nan": False}
)
T = TypeVar("T")


def check(
    cls: type[T],
    values: Mapping[str, Any],
    where: Any,
    prefix: str = "",
    names: Mapping[str, str] | None = None,
) -> T:
    """The pydantic dataclass `cls` made of values from a parsed JSON file.

    Types are strict: true is no integer, and "1" is no number. A list becomes a tuple. Keys that
    are no fields of `cls` are left alone.

    Args:
      values: by the file's keys.
      where: the file, for errors.
      prefix: what stands before the keys in errors, such as "rope_scaling.".
      names: the file's key of each field that is called otherwise in `cls`.

    Raises UserError for a value that `cls` refuses.
    """
    keys = {f.name: (names or {}).get(f.name, f.name) for f in dataclasses.fields(cls)}
    given = {field: values[key] for field, key in keys.items() if key in values}
    try:
        # In JSON mode strict pydantic takes an object for a dataclass and a list for a tuple.
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(given), strict=True)
    except pydantic.ValidationError as e:
        full = {field: prefix + key for field, key in keys.items()}
        raise explained(e, where, full, given) from None


def explained(
    error: pydantic.ValidationError,
    where: Any,
    names: Mapping[str, str],
    given: Mapping[str, Any],
) -> UserError:
    """The first of pydantic's errors as one line, in which fields are called by the file's keys.

    Args:
      names: the file's key of each field.
      given: what was given for each field.
    """
    first = error.errors()[0]
    if first["type"] == "value_error":  # raised by a dataclass about several of its fields
        text = str(first["ctx"]["error"])
        text = re.sub(r"[\w.]+", lambda word: names.get(word[0], word[0]), text)
        return UserError(f"{where}: {storage.one_line(text)}")
    if not first["loc"]:  # text that no JSON parser takes, such as half a surrogate pair
        return UserError(f"{where}: {storage.one_line(first['msg'])}")
    field, *inside = first["loc"]
    key = names.get(field, field)
    if field not in given:
        return UserError(f"{where}: {key} is missing")
    value = given[field]
    for part in inside:  # keys and indices, and the names of a union's members
        if part in value if isinstance(value, dict) else isinstance(part, int):
            value, key = value[part], f"{key}.{part}"
    expected = storage.one_line(first["msg"].replace("Input", "it", 1))
    return UserError(f"{where}: {key} is {shortened(value)}; {expected}")


def check_neutral(
    values: Mapping[str, Any],
    where: Any,
    neutral: Mapping[str, tuple],
    remedies: Mapping[str, str],
    remedy: str = "",
) -> None:
    """Raises UserError for a key that changes the model's function as this package cannot express.

    Args:
      neutral: the values with which each key changes nothing.
      remedies: what to do about a key; `remedy` is for all others.
    """
    for key, harmless in neutral.items():
        if key in values and values[key] not in harmless:
            way_out = remedies.get(key, remedy)
            raise UserError(
                f"{where}: {key} is {shortened(values[key])}, which cannot be expressed here"
                + (f": {way_out}" if way_out else "")
            )


def shortened(value: Any) -> str:
    """A value as JSON, for an error; at most 60 characters of it."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
