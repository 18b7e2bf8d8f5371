"""From logical axes to placement: one strict resolver for parameters and activations.

Every dimension has a logical axis; the rules table of the config maps a logical axis to ordered
candidates, each one or several mesh axes, or null for "whole on every device". The first candidate
that divides the dimension and uses no mesh axis taken by an earlier dimension wins. When none does,
or the axis has no rule, that is an error with the way out, never silent replication.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jllama.config import ShardingConfig
from jllama.errors import UserError

_active: contextvars.ContextVar["Placement | None"] = contextvars.ContextVar(
    "placement", default=None
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules that place arrays on it."""

    mesh: Mesh | AbstractMesh
    rules: ShardingConfig

    @property
    def platform(self) -> str:
        """Of the mesh's devices: "cpu", "gpu" or "tpu"; they need not be attached."""
        return self.mesh.devices.flat[0].platform

    def mesh_axes(
        self, shape: Sequence[int], axes: Sequence[str | None], name: str
    ) -> tuple[tuple[str, ...], ...]:
        """The mesh axes that share out each dimension of an array of `shape` with logical `axes`.

        None has none: the dimension is whole on every device. `name` is for errors.
        """
        if len(shape) != len(axes):
            raise UserError(f"{name}: shape {tuple(shape)} has not the logical axes {tuple(axes)}")
        used: set[str] = set()
        parts: list[tuple[str, ...]] = []
        for size, axis in zip(shape, axes, strict=True):
            choice = () if axis is None else self._choose(size, axis, used, shape, name)
            used.update(choice)
            parts.append(choice)
        return tuple(parts)

    def spec(self, shape: Sequence[int], axes: Sequence[str | None], name: str) -> PartitionSpec:
        """`mesh_axes` as a partition."""
        return self.partition(*self.mesh_axes(shape, axes, name))

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
            ways = math.prod(self.mesh.shape[a] for a in candidate)
            if size % ways == 0 and not used.intersection(candidate):
                return tuple(candidate)
            why = "taken" if used.intersection(candidate) else f"{ways} does not divide"
            tried.append(f"{'+'.join(candidate)} ({why})")
        raise UserError(
            f"{name}: axis {axis!r} of shape {tuple(shape)}, size {size}: no candidate fits:"
            f" {', '.join(tried)}; change the mesh, or add a candidate (null is replication)"
            f" to sharding.{axis}"
        )

    def sharding(
        self, shape: Sequence[int], axes: Sequence[str | None], name: str
    ) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(shape, axes, name))

    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def put_batch(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Host arrays [B, ...] onto the mesh, rows spread as the rules say."""
        return {
            k: jax.device_put(v, self.sharding(v.shape, ("batch",) + (None,) * (v.ndim - 1), k))
            for k, v in batch.items()
        }

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
    """The placement that `constrain` uses, if any."""
    return _active.get()


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's placement by its logical axes; the identity when none is active."""
    placement = _active.get()
    if placement is None:
        return x
    return jax.lax.with_sharding_constraint(x, placement.sharding(x.shape, axes, "activation"))
