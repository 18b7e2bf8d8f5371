"""Makes the mesh of devices from its config."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jllama.config import MeshConfig
from jllama.errors import UserError

# From the slowest network to the fastest: neighbours along the last axis have the fastest links.
AXES = ("replica", "fsdp", "context", "tensor")
# jax.make_mesh defaults to Explicit axes; this package places arrays by sharding constraints.
_TYPES = (AxisType.Auto,) * len(AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), with axes `AXES`; a size of -1 takes the rest.

    On TPU the order follows the links between the chips. The data-centre network joins several
    slices (`slice_index`); only `replica` crosses it, and all other axes stay within a slice. The
    devices may belong to a topology that is only compiled for.

    Raises `UserError` if the product of the sizes is not the number of devices, or if the number
    of slices does not divide `replica`.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes(config, len(devices))
    # On other platforms `slice_index` is the machine of a device, and any axis may cross machines.
    on_tpu = devices[0].platform == "tpu"
    slices = {getattr(d, "slice_index", 0) for d in devices} if on_tpu else {0}
    _check_slices(sizes, len(slices))
    inner, outer = (sizes[0] // len(slices), *sizes[1:]), (len(slices), 1, 1, 1)
    # JAX would arrange some slices as a ring, which has no `scatter_stages`.
    row_by_row = on_tpu and sum(n > 1 for n in inner) == 1
    if row_by_row:
        ordered = None
    elif len(slices) > 1:
        ordered = _arrange(mesh_utils.create_hybrid_device_mesh, inner, outer, devices)
    else:
        ordered = _arrange(mesh_utils.create_device_mesh, sizes, devices)
    if ordered is None:
        ordered = np.array(sorted(devices, key=_place), object).reshape(sizes)
    return Mesh(ordered, AXES, axis_types=_TYPES)


@functools.cache
def scatter_stages(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the sizes of the reduce-scatters into which one over `axes` is split.

    On a TPU each runs along one dimension of the torus. Their product is the number of devices
    along `axes`, which lie in row-major order of these sizes. There is a single one if the devices
    in their order are no box of the torus, and on other platforms.
    """
    ways = math.prod(mesh.shape[a] for a in axes)
    if isinstance(mesh, AbstractMesh) or mesh.devices.flat[0].platform != "tpu":
        return (ways,)
    rest = [a for a in mesh.axis_names if a not in axes]
    order = [mesh.axis_names.index(a) for a in (*axes, *rest)]
    along = mesh.devices.transpose(order).reshape(ways, -1)[:, 0]
    places = np.array([d.coords for d in along])
    stages: list[int] = []
    step = 1
    while step < ways:
        size = next(
            (n for n in range(ways // step, 1, -1) if _along_one_dimension(places, n, step)), None
        )
        if size is None:
            return (ways,)
        stages.insert(0, size)
        step *= size
    return tuple(stages)


def _along_one_dimension(places: np.ndarray, size: int, step: int) -> bool:
    """Whether every `size` devices that are `step` apart differ in one coordinate, the same one."""
    if len(places) % (size * step):
        return False
    lines = places.reshape(-1, size, step, places.shape[-1])
    return np.count_nonzero(np.any(lines != lines[:, :1], axis=(0, 1, 2))) == 1


def context_mesh(mesh: Mesh) -> Mesh:
    """The mesh of the same devices in the same order, all of them along `context`."""
    sizes = [mesh.size if axis == "context" else 1 for axis in AXES]
    return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=_TYPES)


def parse_mesh(text: str) -> MeshConfig:
    """The mesh of an argument `--mesh AXIS=SIZE,...`; an axis that it leaves out has size 1."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for item in text.split(","):
        axis, _, size = item.partition("=")
        if axis not in sizes:
            raise UserError(f"--mesh: {item!r} is no AXIS=SIZE; the axes are {', '.join(AXES)}")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise UserError(f"--mesh: {item!r}: the size must be a whole number") from None
    try:
        return MeshConfig(**sizes)
    except ValueError:
        raise UserError(f"--mesh={text}: sizes must be at least 1, or -1 for one of them") from None


def abstract_mesh(config: MeshConfig, count: int, slices: int = 1) -> AbstractMesh:
    """A mesh of `count` devices that need not exist: enough to tell how arrays would be sharded.

    Raises `UserError` as `make_mesh` does for that many devices in `slices` slices.
    """
    sizes = _sizes(config, count)
    _check_slices(sizes, slices)
    return AbstractMesh(sizes, AXES, axis_types=_TYPES)


def _check_slices(sizes: tuple[int, ...], slices: int) -> None:
    if sizes[0] % slices:
        raise UserError(
            f"mesh.replica={sizes[0]}: the {math.prod(sizes)} devices are {slices} slices, and only"
            f" replica crosses slices; set mesh.replica to {slices} or a multiple"
        )


def _sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    sizes = {name: getattr(config, name) for name in AXES}
    given = {name: size for name, size in sizes.items() if size != -1}
    ways = math.prod(given.values())
    if len(given) < len(sizes):
        if count % ways:
            raise UserError(_not_dividing(given, ways, count))
        return tuple(count // ways if size == -1 else size for size in sizes.values())
    if ways != count:
        asked = ", ".join(f"{n}={size}" for n, size in sizes.items())
        raise UserError(f"mesh: {asked} does not fill {count} devices; set one size to -1")
    return tuple(sizes.values())


def _not_dividing(given: dict[str, int], ways: int, count: int) -> str:
    asked = [f"mesh.{name}={size}" for name, size in given.items() if size > 1]
    by = "it" if len(asked) == 1 else f"their product, {ways}"
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    near = [n for n in divisors if n < ways][-1:] + [n for n in divisors if n > ways][:1]
    choices = " or ".join(map(str, near))
    return f"{', '.join(asked)}: {count} devices do not divide by {by}; they do by {choices}"


def _arrange(create: Any, *args: Any) -> np.ndarray | None:
    """The devices as JAX arranges them along the links; None if it finds no arrangement."""
    try:
        return create(*args)
    except NotImplementedError:
        pass
    except AssertionError:  # two devices a chip, or chips that do not form a box
        return None
    try:
        # No axis of chips has that size: split one, so that its links carry two mesh axes.
        return create(*args, allow_split_physical_axes=True)
    except (TypeError, ValueError):  # JAX 0.10 loses prime factors of sides such as 20 and 28
        return None


def _place(device: jax.Device) -> tuple[int, ...]:
    """Sorts devices by slice, then by row: neighbours in this order mostly share a link."""
    return (getattr(device, "slice_index", 0), *device.coords[::-1], device.core_on_chip)
