"""Devices to mesh."""

import math

import jax
from jax.sharding import AxisType, Mesh

from jllama.config import MeshConfig
from jllama.errors import UserError

AXES = ("replica", "fsdp", "tensor", "context")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), axes `AXES`; a size of -1 takes what is left.

    Raises `UserError` when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in AXES]
    fixed = math.prod(s for s in sizes if s > 0)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        asked = ", ".join(f"{n}={getattr(config, n)}" for n in AXES)
        raise UserError(f"mesh: {asked} does not fill {len(devices)} devices; set one size to -1")
    # make_mesh defaults to Explicit axes; the placement here is by constraints.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
