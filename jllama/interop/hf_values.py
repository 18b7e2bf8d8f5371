"""Values of a parsed JSON file, of the types that they must have."""

import sys
from collections.abc import Mapping
from typing import Any

from jllama.errors import UserError

LARGEST = 100_000_000  # a size, or a length, that is no mistake


class Reader:
    """Values of a JSON object, of the types they must have."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config = config
        self.where = where

    def error(self, key: str, what: str) -> UserError:
        return UserError(f"{self.where}: {key} {what}")

    def _get(self, key: str, default: Any, null: bool) -> Any:
        value = self.config.get(key, default)
        if value is None and null:
            value = default
        if value is None:
            raise self.error(key, "is null" if key in self.config else "is missing")
        return value

    def integer(self, key: str, default: int | None = None, null: bool = False) -> int:
        value = self._get(key, default, null)
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise self.error(key, f"is {short(value)}, expected an integer from 1 to {LARGEST:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default, False)
        # An int may be too large for a float.
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.error(key, f"is {short(value)}, which is no positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default, False)
        if type(value) is not bool:
            raise self.error(key, f"is {short(value)}, which is neither true nor false")
        return value


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
