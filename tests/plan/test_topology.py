"""Names of slices."""

import re

import pytest

from jllama.errors import UserError
from jllama.plan.devices import hbm_bytes
from jllama.plan.topology import parse


def test_names_of_slices():
    topology = parse("v5p:4x4x8", slices=2)
    assert (topology.chip.kind, topology.shape, topology.slices) == ("TPU v5", (4, 4, 8), 2)
    assert not topology.on_gpu
    assert parse("v5e:1x1").shape == (1, 1)
    assert parse("gpu:h100:16").on_gpu


@pytest.mark.parametrize(
    ("name", "ours", "chips"),
    [
        ("v5e-16", "v5e:4x4", 16),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5litepod-8", "v5e:2x4", 8),
        ("v6e-64", "v6e:8x8", 64),
        ("v6e-1", "v6e:1x1", 1),
        ("v4-32", "v4:2x2x4", 16),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-12288", "v5p:16x16x24", 6144),
    ],
)
def test_the_clouds_name_is_its_default_topology(name, ours, chips):
    topology = parse(name, slices=2)
    assert (topology, topology.devices) == (parse(ours, slices=2), 2 * chips)


@pytest.mark.parametrize(
    ("name", "slices", "said"),
    [
        ("v5e-15", 1, "sizes: 1, 4, 8, 16, 32, 64, 128, 256; or give the sides, v5e:AxB$"),
        ("v5p-100", 1, "TensorCores, two to a chip; sizes: 8, 16, .*, 12288; .* v5p:AxBxC$"),
        ("v4-12288", 1, "sizes: 8, .* 8192; or"),
        ("v9-16", 1, "allowed: v4:AxBxC"),
        ("v9:2x2", 1, "allowed: v4:AxBxC"),
        ("v5e:4x4x4", 1, "2 sides"),
        ("v5p:4x4", 1, "3 sides"),
        ("v5e:3x3", 1, "sides even"),
        ("v5e:0x4", 1, "no such slice"),
        ("v5e:32x32", 1, "1,024 chips, .* pod has 256"),
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


def test_what_an_error_allows_is_a_slice():
    for name in ("v5e-15", "v5p-100", "v4-12288"):
        with pytest.raises(UserError) as error:
            parse(name)
        sizes, sides = re.search(
            r"sizes: (.*); or give the sides, (.*)$", str(error.value)
        ).groups()
        kind = name.partition("-")[0]
        assert all(parse(f"{kind}-{size}").devices for size in sizes.split(", "))
        parse(sides.replace("A", "2").replace("B", "2").replace("C", "4"))
    assert parse("v5e:16x16", slices=4).devices == 1024  # smaller slices than 32x32
    with pytest.raises(UserError) as error:
        parse("gpu:h100:8", 2)
    assert parse(str(error.value).rpartition(" ")[2]).devices == 16


FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def test_a_gpus_capacity_is_the_part_of_its_memory_that_jax_takes(monkeypatch):
    for name in FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    gpu = parse("gpu:h100:8")
    whole = hbm_bytes(gpu) / 0.75
    for name in FRACTIONS:
        with monkeypatch.context() as here:
            here.setenv(name, "0.9")
            assert hbm_bytes(gpu) == pytest.approx(0.9 * whole)
            assert hbm_bytes(parse("v5e:2x2")) == 15.75 * 2**30
            for wrong in ("most", "nan", "0"):
                here.setenv(name, wrong)
                with pytest.raises(UserError, match=f"^{name}={wrong}: "):
                    hbm_bytes(gpu)
