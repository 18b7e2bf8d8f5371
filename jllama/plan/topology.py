"""Parses names of TPU slices and of GPUs, such as v5p:8x8x8 and gpu:h100:8."""

import dataclasses
import math
import re

from jllama.chips import CHIPS, Chip
from jllama.errors import UserError


@dataclasses.dataclass(frozen=True)
class Pod:
    """The slices of one TPU generation; docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}.

    Attributes:
      dimensions: dimensions of the torus.
      chips: chips of a pod, the largest slice.
      rings: a side is a ring if it is a multiple of this; in 3D all sides are rings or none.
      config: libtpu's name for how cores form devices; on v4 the two cores of a chip are one
        device, "megacore".
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
    " a cloud's name, such as v5p-256 or v5litepod-16; or gpu:h100:N"
)
# The topologies that Google Cloud gives when only the size is named, by the dimensions of the pod.
# Names of v4 and v5p count TensorCores, two to a chip; those of v5e and v6e count chips. Sources:
# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} and .../kubernetes-engine/docs/concepts/plan-tpus.
_DEFAULTS = {
    2: "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    3: "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x12 8x8x16 8x16x16 16x16x16 16x16x24",
}


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
    """The topology of a command line. Raises `UserError` for a slice that does not exist."""
    if slices < 1:
        raise UserError(f"--slices={slices}: must be at least 1")
    gpu = re.fullmatch(r"gpu:([a-z0-9]+):(\d+)", name)
    if gpu:
        return _gpu(name, gpu[1], int(gpu[2]), slices)
    cloud = re.fullmatch(r"(v\w+)-(\d+)", name)
    if cloud:
        return parse(_of_cloud(name, cloud[1].replace("5litepod", "5e"), int(cloud[2])), slices)
    slice_name = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    pod = _PODS.get(slice_name[1]) if slice_name else None
    if slice_name is None or pod is None:
        raise UserError(f"--topology {name}: not a known slice; allowed: {_ALLOWED}")
    chip, shape = slice_name[1], tuple(map(int, slice_name[2].split("x")))
    if len(shape) != pod.dimensions:
        raise UserError(f"--topology {name}: a {chip} slice has {pod.dimensions} sides")
    # A host has 2x2 chips of the slice; only v5e and v6e have slices of a single chip.
    if 0 in shape or (shape != (1, 1) and (shape[0] % 2 or shape[1] % 2)):
        raise UserError(f"--topology {name}: no such slice; allowed: {_ALLOWED}")
    if math.prod(shape) > pod.chips:
        raise UserError(
            f"--topology {name}: {math.prod(shape):,} chips, and a {chip} pod has {pod.chips:,};"
            " take smaller slices and --slices"
        )
    return Topology(name, chip, shape, slices)


def _of_cloud(name: str, chip: str, size: int) -> str:
    """Our name of the slice that Google Cloud calls `name`."""
    pod = _PODS.get(chip)
    if pod is None:
        raise UserError(f"--topology {name}: not a known slice; allowed: {_ALLOWED}")
    cores = pod.dimensions - 1  # that the name counts per chip
    shapes = {
        math.prod(map(int, shape.split("x"))) * cores: shape
        for shape in _DEFAULTS[pod.dimensions].split()
    }
    if size not in shapes or size > pod.chips * cores:
        counted = "TensorCores, two to a chip" if cores == 2 else "chips"
        sizes = ", ".join(str(n) for n in shapes if n <= pod.chips * cores)
        raise UserError(
            f"--topology {name}: no default slice has that many {counted}; sizes: {sizes}; or give"
            f" the sides, {chip}:{'x'.join('ABC'[: pod.dimensions])}"
        )
    return f"{chip}:{shapes[size]}"


def _gpu(name: str, chip: str, count: int, slices: int) -> Topology:
    if chip != "h100" or count < 1 or (count > 8 and count % 8):
        raise UserError(f"--topology {name}: allowed: gpu:h100:N, N up to 8 or a multiple of 8")
    if slices > 1:
        raise UserError(f"--slices={slices}: is for TPUs; name all GPUs, gpu:h100:{count * slices}")
    return Topology(name, chip, (count,), 1)
