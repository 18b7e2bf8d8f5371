"""Attention over a mesh: each device runs the attention kernel on its shard, in `jax.shard_map`.

Rows are sharded over the data axes, heads over `tensor`, positions over `context`. Where positions
are sharded, every device gathers all keys and values and attends with its own queries, as Llama 3
did (arXiv:2407.21783, section 3.3.2): segments need nothing special, and with grouped queries the
gathered arrays are small. Under a causal mask late queries cost more than early ones, so a row of T
positions has two layouts over C devices:

  natural   device i holds positions [i T/C, (i+1) T/C)
  balanced  device i holds chunks i and 2C-1-i of 2C: every device has the same work

All layers but attention treat each position by itself, so they do not depend on the layout.

B batch, T query positions, S key positions, H query heads, K key/value heads, N head width.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jllama.config import ShardingConfig
from jllama.parallel.mesh import context_mesh
from jllama.parallel.sharding import Placement, active_placement, ways_of

# (q [B,T,H,N], k and v [B,S,K,N], index of each query among the keys [T], segments [B,S] or None,
# the kernel's precomputed mask or None) -> [B,T,H,N]
Kernel = Callable[..., jax.Array]


def platform() -> str:
    """The platform that the computation will run on: "cpu", "gpu" or "tpu".

    It is the platform of the active placement's devices, which this process need not have when it
    only compiles the program. Without an active placement it is JAX's default backend.
    """
    placement = active_placement()
    return jax.default_backend() if placement is None else placement.platform


def sequence_ways(rows: int, length: int) -> int:
    """The number of devices over which the active placement shards the positions [rows, length]."""
    placement = active_placement()
    return 1 if placement is None else ways_of(placement.mesh, _spec(placement, (rows, length))[1])


def context_placement(params: Any) -> Placement | None:
    """A placement that shards positions, and nothing else, over all devices that hold `params`.

    With it all devices work on one row, however long. Returns None if the parameters are on no
    mesh.
    """
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return Placement(context_mesh(sharding.mesh), ShardingConfig())


def balanced_order(length: int, ways: int) -> np.ndarray | None:
    """The positions of a row in the order of the balanced layout, [length] int32.

    Returns None, for the natural order, with one device or a length that 2 * ways does not divide.
    """
    if ways == 1 or length % (2 * ways):
        return None
    chunks = np.arange(length, dtype=np.int32).reshape(2 * ways, -1)
    return np.stack([chunks[:ways], chunks[: ways - 1 : -1]], axis=1).reshape(-1)


def spread(
    kernel: Kernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    balanced: bool,
    mask: Any = None,
    prevent_cse: bool = True,
) -> jax.Array:
    """Runs `kernel` on every device of the active placement, each with its shard of the queries.

    Without an active placement, or with one device, it calls the kernel directly.

    Args:
      q: [B,T,H,N]; k, v: [B,T,K,N]; segments: [B,T] or None; all in the same layout.
      balanced: whether they are in the balanced layout.
      mask: a mask that the kernel precomputed, or None. Its method `manual_sharding_spec` returns
        how it is sharded when the queries are.
      prevent_cse: passed to `jax.checkpoint`, which gathers keys and values again for the backward
        pass; False where a loop or a rematerialised block already separates the two passes.

    Returns:
      [B,T,H,N], in the same layout.
    """
    placement = active_placement()
    if placement is None or placement.mesh.size == 1:
        return kernel(q, k, v, np.arange(q.shape[1], dtype=np.int32), segments, mask)
    spec = _spec(placement, q.shape)
    batch, seq, heads, _ = spec
    ways, head_ways = ways_of(placement.mesh, seq), ways_of(placement.mesh, heads)
    # With fewer key/value heads than tensor ways, each head is repeated just often enough that
    # every device has the heads that its queries need.
    repeats = head_ways // math.gcd(k.shape[2], head_ways)
    if repeats > 1:
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)

    def own_rows(t: int) -> jax.Array | np.ndarray:
        """The natural index of the t positions that this device holds."""
        if ways == 1:
            return np.arange(t, dtype=np.int32)
        device = lax.axis_index(seq)
        if not balanced:
            return device * t + jnp.arange(t)
        chunks = jnp.stack([device, 2 * ways - 1 - device]) * (t // 2)
        return (chunks[:, None] + jnp.arange(t // 2)).reshape(t)

    def gather(x: jax.Array) -> jax.Array:
        """Gathers the shards [B, T/C, ...] of all devices into [B, T, ...] in natural order."""
        return _natural(lax.all_gather(x, seq, axis=1), balanced)

    def local(q, k, v, segments, mask):
        if ways > 1:
            k, v = gather(k), gather(v)
            if segments is not None:
                segments = _natural(segments.reshape(len(segments), ways, -1), balanced)
        return kernel(q, k, v, own_rows(q.shape[1]), segments, mask)

    if ways > 1:
        # The backward pass gathers again; otherwise every layer would keep keys and values of the
        # whole row. The values that the kernel names (its result) are saved, so that the kernel
        # does not run again.
        policy = jax.checkpoint_policies.save_only_these_names("attention")
        local = jax.checkpoint(local, policy=policy, prevent_cse=prevent_cse)

    parts = None
    if mask is not None:
        queries = NamedSharding(placement.mesh, PartitionSpec(None, seq))
        parts = mask.manual_sharding_spec(queries)
    # Every device has the segments of whole rows: the kernel reads all of them, and they are small.
    specs = (spec, spec, spec, PartitionSpec(batch), parts)
    return placement.per_device(local, specs, spec)(q, k, v, segments, mask)


def _spec(placement: Placement, shape: tuple[int, ...]) -> PartitionSpec:
    axes = ("batch", "seq", "act_heads", None)[: len(shape)]
    return placement.spec(shape, axes, "attention")


def _natural(x: jax.Array, balanced: bool) -> jax.Array:
    """Puts the shards [B, C, T/C, ...] of C devices into natural order, [B, T, ...]."""
    B, C, t = x.shape[:3]
    if balanced:
        early, late = jnp.split(x, 2, axis=2)
        x = jnp.concatenate([early, jnp.flip(late, axis=1)], axis=1)
    return x.reshape(B, C * t, *x.shape[3:])
