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
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jllama.config import ShardingConfig
from jllama.errors import UserError

_active: contextvars.ContextVar["Placement | None"] = contextvars.ContextVar(
    "placement", default=None
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules that place arrays on it."""

    mesh: Mesh
    rules: ShardingConfig

    @property
    def platform(self) -> str:
        """Of the mesh's devices: "cpu", "gpu" or "tpu"; they need not be attached."""
        return self.mesh.devices.flat[0].platform

    def spec(self, shape: Sequence[int], axes: Sequence[str | None], name: str) -> PartitionSpec:
        """The partition of an array of `shape` with logical `axes`; `name` is for errors.

        An axis of None is whole on every device.
        """
        if len(shape) != len(axes):
            raise UserError(f"{name}: shape {tuple(shape)} has not the logical axes {tuple(axes)}")
        used: set[str] = set()
        parts: list[tuple[str, ...] | None] = []
        for size, axis in zip(shape, axes, strict=True):
            choice = None if axis is None else self._choose(size, axis, used, shape, name)
            used.update(choice or ())
            parts.append(choice)
        return PartitionSpec(*parts)

    def _choose(
        self, size: int, axis: str, used: set[str], shape: Sequence[int], name: str
    ) -> tuple[str, ...] | None:
        candidates = getattr(self.rules, axis, None)
        if candidates is None:
            raise UserError(f"{name}: logical axis {axis!r} has no rule in the sharding config")
        tried = []
        for candidate in candidates:
            if candidate is None:
                return None
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


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's placement by its logical axes; the identity when none is active."""
    placement = _active.get()
    if placement is None:
        return x
    return jax.lax.with_sharding_constraint(x, placement.sharding(x.shape, axes, "activation"))
