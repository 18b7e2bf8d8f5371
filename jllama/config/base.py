"""The parts of every config: a class decorator, described fields, and numbers with limits."""

import functools
from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, Field, PlainSerializer

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Nonnegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _sorted_pairs(options: Any) -> tuple[tuple[str, Any], ...]:
    if isinstance(options, tuple):  # as they are kept
        options = dict(options)
    if not isinstance(options, dict):
        raise ValueError("expected the names of options, each with a value")
    for name, value in options.items():
        if isinstance(value, dict | list):
            raise ValueError(f"{name}: expected a number, true or false, text, or null")
    return tuple(sorted(options.items()))


# Names with values: keys and values in YAML, and sorted pairs in Python, which are hashable.
Options = Annotated[
    tuple[tuple[str, Any], ...], BeforeValidator(_sorted_pairs), PlainSerializer(dict)
]

configclass = functools.partial(
    pydantic.dataclasses.dataclass,
    frozen=True,
    kw_only=True,
    config=pydantic.ConfigDict(extra="forbid", allow_inf_nan=False),
)


def doc(text: str, **kwargs: Any) -> Any:
    """Declares a required field; `text` is its description in `--help`."""
    return Field(description=text, **kwargs)


def default(text: str, value: Any, **kwargs: Any) -> Any:
    """Declares an optional field; `text` is its description in `--help`."""
    return Field(default=value, description=text, **kwargs)
