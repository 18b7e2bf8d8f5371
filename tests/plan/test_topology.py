"""Names of slices."""

import pytest

from jllama.errors import UserError
from jllama.plan.topology import parse


def test_names_of_slices():
    topology = parse("v5p:4x4x8", slices=2)
    assert (topology.chip.kind, topology.shape, topology.slices) == ("TPU v5", (4, 4, 8), 2)
    assert not topology.on_gpu
    assert parse("v5e:1x1").shape == (1, 1)
    assert parse("gpu:h100:16").on_gpu


@pytest.mark.parametrize(
    ("name", "slices", "said"),
    [
        ("v5e-16", 1, "allowed: v4:AxBxC"),
        ("v9:2x2", 1, "allowed: v4:AxBxC"),
        ("v5e:4x4x4", 1, "2 sides"),
        ("v5p:4x4", 1, "3 sides"),
        ("v5e:3x3", 1, "sides even"),
        ("v5e:0x4", 1, "no such slice"),
        ("v5e:32x32", 1, "1,024 chips, a v5e pod has 256"),
        ("v5e:2x2", 0, "--slices=0"),
        ("gpu:h100:12", 1, "multiple of 8"),
        ("gpu:mi300:8", 1, "gpu:h100:N"),
        ("gpu:h100:8", 2, "gpu:h100:16"),
    ],
)
def test_a_wrong_name_is_a_line_that_says_what_is_allowed(name, slices, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")) as error:
        parse(name, slices)
    assert "\n" not in str(error.value)
