"""Config files of other projects: types are strict, and a bad value is one line."""

from typing import Literal

import pytest

from jllama.errors import UserError
from jllama.interop.json_config import Positive, Size, check, json_dataclass, shortened


@json_dataclass
class _File:
    size: Size
    scale: Positive = 1.0
    flag: bool = False
    kinds: tuple[Literal["a", "b"], ...] = ()
    names: tuple[str, ...] | str | None = None
    ranks: dict[str, Size] | None = None


def read(**values):
    return check(_File, {"n": 3} | values, "file.json", "inner.", {"size": "n"})


def test_good_values_are_read_by_the_files_keys():
    values = {"scale": 2, "flag": True, "kinds": ["a"], "names": ["x"], "ranks": {"q": 1}}
    wanted = _File(size=3, scale=2.0, flag=True, kinds=("a",), names=("x",), ranks={"q": 1})
    assert read(**values, other=[]) == wanted


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"n": True}, "inner.n is true; it should be a valid integer"),
        ({"n": "1"}, 'inner.n is "1"; it should be a valid integer'),
        ({"n": 0}, "inner.n is 0; it should be greater than or equal to 1"),
        ({"n": 10**30}, "less than or equal to 100000000"),
        ({"n": None}, "inner.n is null"),
        ({"scale": True}, "inner.scale is true"),
        ({"scale": float("nan")}, "inner.scale is NaN; it should be a finite number"),
        ({"scale": 10**400}, "...; it should be a finite number"),
        ({"flag": 1}, "inner.flag is 1; it should be a valid boolean"),
        ({"kinds": ["a", "c"]}, 'inner.kinds.1 is "c"'),
        ({"kinds": "a"}, 'inner.kinds is "a"; it should be a valid array'),
        ({"names": 7}, "inner.names is 7"),
        ({"names": [1]}, "inner.names.0 is 1; it should be a valid string"),
        ({"ranks": {"q": 0}}, "inner.ranks.q is 0"),
        ({"names": "\ud800"}, "Invalid JSON"),
    ],
)
def test_a_bad_value_is_one_line(values, said):
    with pytest.raises(UserError) as e:
        read(**values)
    assert str(e.value).startswith("file.json: ") and said in str(e.value)
    assert "\n" not in str(e.value) and len(str(e.value)) < 150


def test_a_missing_key():
    with pytest.raises(UserError, match=r"^file\.json: size is missing$"):
        check(_File, {}, "file.json")


def test_a_long_value_is_shortened():
    assert shortened("x" * 100) == '"' + "x" * 56 + "..."
