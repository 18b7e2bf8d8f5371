"""Resolves logical axes to shardings, strictly, for parameters and activations.

Every dimension has a logical axis. The rules table of the config maps it to an ordered list of
candidates; each is one or several mesh axes, or null, which leaves the dimension whole on every
device. The first candidate that divides the dimension, and uses no mesh axis of an earlier
dimension, wins. If none does, or the axis has no rule, the resolver raises an error that says what
to change; it never replicates silently.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from jllama.config import ShardingConfig
from jllama.errors import UserError

# The mesh axes over which each dimension of an array is sharded; a dimension with none is whole.
Parts = tuple[tuple[str, ...], ...]

_active: contextvars.ContextVar["Placement | None"] = contextvars.ContextVar(
    "placement", default=None
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules that place arrays on it.

    Nothing is sharded or summed over the mesh axes `apart`: they are the `spmd_axis_name` of a
    `jax.vmap` around the function whose arrays this placement places. `gradient_dtype` is that of
    gradients as devices send them; those of a narrower dtype are sent as they are. With
    `scatter_in_stages` a reduce-scatter is split into `jllama.parallel.mesh.scatter_stages`.
    """

    mesh: Mesh | AbstractMesh
    rules: ShardingConfig
    apart: tuple[str, ...] = ()
    gradient_dtype: str = "float32"
    scatter_in_stages: bool = False

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that have more than one device and are not in `apart`."""
        return tuple(a for a, n in self.mesh.shape.items() if n > 1 and a not in self.apart)

    @property
    def platform(self) -> str:
        """The platform of the mesh's devices, "cpu", "gpu" or "tpu"; they need not be attached."""
        return self.mesh.devices.flat[0].platform

    @property
    def device_kind(self) -> str:
        """JAX's name of the mesh's kind of device, such as "TPU v5 lite"."""
        return self.mesh.devices.flat[0].device_kind

    def mesh_axes(self, shape: Sequence[int], axes: Sequence[str | None], name: str) -> Parts:
        """The mesh axes over which each dimension of `shape` with logical `axes` is sharded.

        Mesh axes of one device are left out; the logical axis None is whole. `name` is the array's
        name in errors. Raises `UserError` as the module says.
        """
        return tuple(
            tuple(a for a in part if a in self.axes) for part in self._choices(shape, axes, name)
        )

    def spec(self, shape: Sequence[int], axes: Sequence[str | None], name: str) -> PartitionSpec:
        """The `PartitionSpec` of an array of `shape` with logical `axes`; raises as `mesh_axes`."""
        return self.partition(*self._choices(shape, axes, name))

    def _choices(self, shape: Sequence[int], axes: Sequence[str | None], name: str) -> Parts:
        if len(shape) != len(axes):
            raise UserError(
                f"{name}: shape {tuple(shape)} has {len(shape)} dimensions, and there are"
                f" {len(axes)} logical axes: {tuple(axes)}"
            )
        used: set[str] = set()
        parts: list[tuple[str, ...]] = []
        for size, axis in zip(shape, axes, strict=True):
            choice = () if axis is None else self._choose(size, axis, used, shape, name)
            used.update(choice)
            parts.append(choice)
        return tuple(parts)

    @staticmethod
    def partition(*parts: tuple[str, ...]) -> PartitionSpec:
        """The `PartitionSpec` of an array whose dimensions are sharded over the axes `parts`."""
        return PartitionSpec(*(part or None for part in parts))

    def _choose(
        self, size: int, axis: str, used: set[str], shape: Sequence[int], name: str
    ) -> tuple[str, ...]:
        candidates = getattr(self.rules, axis, None)
        if candidates is None:
            raise UserError(f"{name}: logical axis {axis!r} has no rule in the sharding config")
        tried = []
        for candidate in candidates:
            if candidate is None:
                return ()
            candidate = tuple(a for a in candidate if a not in self.apart)
            ways = math.prod(self.mesh.shape[a] for a in candidate)
            if size % ways == 0 and not used.intersection(candidate):
                return candidate
            if size % ways:
                spread = (a for a in candidate if self.mesh.shape[a] > 1)
                tried.append(f"{'+'.join(spread)} ({ways} does not divide)")
            else:
                tried.append(f"{'+'.join(candidate)} (taken)")
        raise UserError(
            f"{name}: axis {axis!r} of shape {tuple(shape)}, size {size}: no candidate fits:"
            f" {', '.join(dict.fromkeys(tried))}; change the mesh, or add a candidate to"
            f" sharding.{axis} (null replicates)"
        )

    def sharding(
        self, shape: Sequence[int], axes: Sequence[str | None], name: str
    ) -> NamedSharding:
        """The sharding of an array of `shape` with logical `axes`; raises as `mesh_axes`."""
        return NamedSharding(self.mesh, self.spec(shape, axes, name))

    def replicated(self) -> NamedSharding:
        """The sharding of an array that is whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch_rows(self, batch_size: int, name: str = "batch") -> list[int]:
        """The rows of a batch that the devices of this process hold, in order.

        Processes that differ only along the tensor or context axis hold the same rows.
        """
        shape = (batch_size,)
        held = self.sharding(shape, ("batch",), name).addressable_devices_indices_map(shape)
        return sorted({row for index in held.values() for row in range(batch_size)[index[0]]})

    def put_batch(self, batch: dict[str, Any], batch_size: int | None = None) -> Any:
        """Puts host arrays onto the mesh as arrays [batch_size, ...], their rows sharded.

        `batch` holds the rows `batch_rows(batch_size)`, or all rows if `batch_size` is None.
        """

        def put(name: str, rows: np.ndarray) -> jax.Array:
            shape = (batch_size or len(rows), *rows.shape[1:])
            sharding = self.sharding(shape, ("batch",) + (None,) * (rows.ndim - 1), name)
            return jax.make_array_from_process_local_data(sharding, rows, shape)

        return {name: put(name, np.asarray(rows)) for name, rows in batch.items()}

    def pin(self, x: jax.Array, *parts: tuple[str, ...]) -> jax.Array:
        """Constrains x to be sharded over `parts`, the mesh axes of each dimension."""
        sharding = NamedSharding(self.mesh, self.partition(*parts))
        return jax.lax.with_sharding_constraint(x, sharding)

    def per_device(
        self, f: Callable[..., Any], in_parts: Any, out_parts: Any
    ) -> Callable[..., Any]:
        """`jax.shard_map` of `f` over this mesh: every device calls it with its local shards.

        `in_parts` and `out_parts` are specs from `partition`. `f` calls the collectives itself.
        """
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=in_parts, out_specs=out_parts, check_vma=False
        )

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes this the active placement; to be entered inside a jitted function."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)


def active_placement() -> Placement | None:
    """The placement whose `active` surrounds this call; None if there is none."""
    return _active.get()


def activated(placement: Placement | None) -> contextlib.AbstractContextManager[None]:
    """`placement.active()`; for None a context that does nothing."""
    return placement.active() if placement else contextlib.nullcontext()


def mesh_axes(shape: Sequence[int], axes: Sequence[str | None], name: str) -> Parts:
    """`Placement.mesh_axes` of the active placement; without one, all dimensions are whole."""
    placement = _active.get()
    return placement.mesh_axes(shape, axes, name) if placement else ((),) * len(shape)


def pin(x: jax.Array, parts: Parts) -> jax.Array:
    """`Placement.pin` of the active placement; without one it returns x."""
    placement = _active.get()
    return placement.pin(x, *parts) if placement else x


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation by its logical axes to the active placement; without one returns x."""
    return pin(x, mesh_axes(x.shape, axes, "activation"))


def whole_rows_sharding(table: NamedSharding) -> NamedSharding:
    """The sharding of a table [V,D] with its rows whole, for a V that need not divide."""
    return NamedSharding(table.mesh, PartitionSpec(None, *table.spec[1:]))


def layer_sharding(stacked: NamedSharding) -> NamedSharding:
    """The sharding of one layer of a stacked parameter [L,...]: the same without the first axis."""
    return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))


def scales_sharding(sharding: Sharding, shape: Sequence[int], full: Sequence[int]) -> Sharding:
    """The sharding of an array with one entry per block of a larger array, such as its scales.

    The larger array has shape `full` and lies by `sharding`; `shape` has as many dimensions. A
    dimension is sharded like the larger array's if it divides, else it is whole.
    """
    if not isinstance(sharding, NamedSharding):  # on a single device
        return sharding
    spec = (*sharding.spec, *(None for _ in full))[: len(full)]
    ways = [ways_of(sharding.mesh, part) for part in spec]
    return NamedSharding(
        sharding.mesh,
        PartitionSpec(
            *(p if n % w == 0 else None for p, n, w in zip(spec, shape, ways, strict=True))
        ),
    )


def ways_of(mesh: Mesh | AbstractMesh, part: str | tuple[str, ...] | None) -> int:
    """The number of devices over which a dimension is sharded; `part` is its part of a spec."""
    axes = (part,) if isinstance(part, str) else part or ()
    return math.prod(mesh.shape[a] for a in axes)
