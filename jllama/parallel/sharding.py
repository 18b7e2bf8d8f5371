"""From logical axes to placement: one strict resolver for parameters and activations.

Every dimension has a logical axis; the rules table of the config maps a logical axis to ordered
candidates, each one or several mesh axes, or null for "whole on every device". The first candidate
that divides the dimension and uses no mesh axis taken by an earlier dimension wins. When none does,
or the axis has no rule, that is an error with the way out, never silent replication.
"""

import bisect
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

# The mesh axes that share out each dimension of an array; none: the dimension is whole everywhere.
Parts = tuple[tuple[str, ...], ...]

_active: contextvars.ContextVar["Placement | None"] = contextvars.ContextVar(
    "placement", default=None
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules that place arrays on it.

    Along the mesh axes `apart` nothing is spread and nothing summed: they are a `jax.vmap` of what
    is placed here, whose `spmd_axis_name` they are.
    """

    mesh: Mesh | AbstractMesh
    rules: ShardingConfig
    apart: tuple[str, ...] = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes of more than one device that are not apart."""
        return tuple(a for a, n in self.mesh.shape.items() if n > 1 and a not in self.apart)

    @property
    def platform(self) -> str:
        """Of the mesh's devices: "cpu", "gpu" or "tpu"; they need not be attached."""
        return self.mesh.devices.flat[0].platform

    def mesh_axes(self, shape: Sequence[int], axes: Sequence[str | None], name: str) -> Parts:
        """The mesh axes that share out each dimension of an array of `shape` with logical `axes`.

        None has none, and an axis of one device is none. `name` is for errors.
        """
        return tuple(
            tuple(a for a in part if a in self.axes) for part in self._choices(shape, axes, name)
        )

    def spec(self, shape: Sequence[int], axes: Sequence[str | None], name: str) -> PartitionSpec:
        """The partition of an array of `shape` with logical `axes`."""
        return self.partition(*self._choices(shape, axes, name))

    def _choices(self, shape: Sequence[int], axes: Sequence[str | None], name: str) -> Parts:
        if len(shape) != len(axes):
            raise UserError(f"{name}: shape {tuple(shape)} has not the logical axes {tuple(axes)}")
        used: set[str] = set()
        parts: list[tuple[str, ...]] = []
        for size, axis in zip(shape, axes, strict=True):
            choice = () if axis is None else self._choose(size, axis, used, shape, name)
            used.update(choice)
            parts.append(choice)
        return tuple(parts)

    @staticmethod
    def partition(*parts: tuple[str, ...]) -> PartitionSpec:
        """The partition of an array whose dimensions are shared out over `parts`."""
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
            f" {', '.join(dict.fromkeys(tried))}; change the mesh, or add a candidate (null is"
            f" replication) to sharding.{axis}"
        )

    def sharding(
        self, shape: Sequence[int], axes: Sequence[str | None], name: str
    ) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(shape, axes, name))

    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch_rows(self, batch_size: int, name: str = "batch") -> list[int]:
        """The rows of a batch that this process's devices hold, in order.

        With processes along tensor or context axes, several hold the same rows.
        """
        shape = (batch_size,)
        held = self.sharding(shape, ("batch",), name).addressable_devices_indices_map(shape)
        return sorted({row for index in held.values() for row in range(batch_size)[index[0]]})

    def put_batch(self, batch: dict[str, Any], batch_size: int | None = None) -> Any:
        """Host arrays onto the mesh as arrays [batch_size, ...], spread as the rules say.

        `batch` holds the rows of `batch_rows(batch_size)`, or all of them if `batch_size` is None.
        """
        return {k: self._put(k, np.asarray(v), batch_size) for k, v in batch.items()}

    def _put(self, name: str, rows: np.ndarray, batch_size: int | None) -> jax.Array:
        shape = (len(rows) if batch_size is None else batch_size, *rows.shape[1:])
        where = self.sharding(shape, ("batch",) + (None,) * (rows.ndim - 1), name)
        if len(rows) == shape[0]:
            return jax.make_array_from_callback(shape, where, lambda index: rows[index])
        held = self.batch_rows(shape[0], name)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = range(shape[0])[index[0]]
            first = bisect.bisect_left(held, wanted.start)
            return rows[first : first + len(wanted)]  # a device's rows are neighbours in `held` too

        return jax.make_array_from_callback(shape, where, part)

    def pin(self, x: jax.Array, *parts: tuple[str, ...]) -> jax.Array:
        """x, each of its dimensions shared out over the mesh axes of `parts`."""
        sharding = NamedSharding(self.mesh, self.partition(*parts))
        return jax.lax.with_sharding_constraint(x, sharding)

    def per_device(
        self, f: Callable[..., Any], in_parts: Any, out_parts: Any
    ) -> Callable[..., Any]:
        """`f` as what one device does with its parts, between partitions made by `partition`.

        Inside, the collectives are those that `f` says.
        """
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=in_parts, out_specs=out_parts, check_vma=False
        )

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes `constrain` use this placement; entered inside every jitted function."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)


def active_placement() -> Placement | None:
    """The placement whose `active` surrounds this call."""
    return _active.get()


def activated(placement: Placement | None) -> contextlib.AbstractContextManager[None]:
    """`Placement.active`; of None, nothing."""
    return placement.active() if placement else contextlib.nullcontext()


def mesh_axes(shape: Sequence[int], axes: Sequence[str | None], name: str) -> Parts:
    """`Placement.mesh_axes` of the active placement; when none is active, everything is whole."""
    placement = _active.get()
    return placement.mesh_axes(shape, axes, name) if placement else ((),) * len(shape)


def pin(x: jax.Array, parts: Parts) -> jax.Array:
    """`Placement.pin` by the active placement; the identity when none is active."""
    placement = _active.get()
    return placement.pin(x, *parts) if placement else x


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's placement by its logical axes; the identity when none is active."""
    return pin(x, mesh_axes(x.shape, axes, "activation"))


def with_whole_rows(table: NamedSharding) -> NamedSharding:
    """Where a table lies whose rows need not divide: its first axis is whole."""
    return NamedSharding(table.mesh, PartitionSpec(None, *table.spec[1:]))


def of_a_layer(stacked: NamedSharding) -> NamedSharding:
    """Where one layer of a stacked parameter lies: as the whole does, without its first axis."""
    return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))


def coarser(sharding: Sharding, shape: Sequence[int], of: Sequence[int]) -> Sharding:
    """Where an array lies that has fewer entries than one of shape `of`, which lies by `sharding`.

    Each is of a block of the other's neighbours. A dimension is spread alike where it can be, else
    whole everywhere.
    """
    if not isinstance(sharding, NamedSharding):  # of one device
        return sharding
    spec = (*sharding.spec, *(None for _ in of))[: len(of)]
    ways = [_ways(sharding.mesh, part) for part in spec]
    return NamedSharding(
        sharding.mesh,
        PartitionSpec(
            *(p if n % w == 0 else None for p, n, w in zip(spec, shape, ways, strict=True))
        ),
    )


def _ways(mesh: Mesh | AbstractMesh, part: str | tuple[str, ...] | None) -> int:
    axes = (part,) if isinstance(part, str) else part or ()
    return math.prod(mesh.shape[a] for a in axes)
