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

# Names with values: keys and values in YAML, and sorted pairs in Python, which are hashable.
Options = Annotated[
    tuple[tuple[str, bool | int | float | str | None], ...],
    BeforeValidator(lambda x: tuple(sorted(x.items())) if isinstance(x, dict) else x),
    PlainSerializer(dict),
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
