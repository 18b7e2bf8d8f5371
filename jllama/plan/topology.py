"""Names of slices, such as v5p:8x8x8."""

import dataclasses
import math
import re

from jllama.chips import CHIPS, Chip
from jllama.errors import UserError


@dataclasses.dataclass(frozen=True)
class Pod:
    """What slices of one generation look like; docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}.

    Attributes:
      dimensions: of the torus.
      chips: in a pod, which no slice exceeds.
      rings: a side closes to a ring when it is a multiple of this (3D) or this (2D).
      config: libtpu's name of how cores make devices; on v4 the two of a chip make one, "megacore".
    """

    dimensions: int
    chips: int
    rings: int
    config: str = "default"


_PODS = {
    "v4": Pod(3, 4096, 4, "megacore"),
    "v5e": Pod(2, 256, 16),
    "v5p": Pod(3, 8960, 4),
    "v6e": Pod(2, 256, 16),
}
_ALLOWED = (
    "v4:AxBxC, v5p:AxBxC, v5e:AxB or v6e:AxB, such as v5p:4x4x8, the first two sides even;"
    " or gpu:h100:N"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` slices of `shape` chips each; one chip is one device. GPUs have a shape of (N,)."""

    name: str
    chip_name: str
    shape: tuple[int, ...]
    slices: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.chip_name]

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def pod(self) -> Pod:
        return _PODS[self.chip_name]

    @property
    def on_gpu(self) -> bool:
        return self.chip_name not in _PODS


def parse(name: str, slices: int = 1) -> Topology:
    """The topology of a command line. Raises `UserError` for what no compiler could take."""
    if slices < 1:
        raise UserError(f"--slices={slices}: at least 1")
    gpu = re.fullmatch(r"gpu:([a-z0-9]+):(\d+)", name)
    if gpu:
        return _gpu(name, gpu[1], int(gpu[2]), slices)
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    pod = _PODS.get(found[1]) if found else None
    if found is None or pod is None:
        raise UserError(f"--topology {name}: not a known slice; allowed: {_ALLOWED}")
    shape = tuple(map(int, found[2].split("x")))
    if len(shape) != pod.dimensions:
        raise UserError(f"--topology {name}: a {found[1]} slice has {pod.dimensions} sides")
    # A host has 2x2 chips of the slice; one chip alone is sold of v5e and v6e.
    if 0 in shape or (shape != (1, 1) and (shape[0] % 2 or shape[1] % 2)):
        raise UserError(f"--topology {name}: no such slice; allowed: {_ALLOWED}")
    if math.prod(shape) > pod.chips:
        raise UserError(
            f"--topology {name}: {math.prod(shape):,} chips, a {found[1]} pod has {pod.chips:,};"
            " take smaller slices and --slices"
        )
    return Topology(name, found[1], shape, slices)


def _gpu(name: str, chip: str, count: int, slices: int) -> Topology:
    if chip != "h100" or count < 1 or (count > 8 and count % 8):
        raise UserError(f"--topology {name}: gpu:h100:N, N up to 8 or a multiple of 8")
    if slices > 1:
        raise UserError(f"--slices={slices}: for TPUs; say all GPUs, gpu:h100:{count * slices}")
    return Topology(name, chip, (count,), 1)
