"""Attention over a mesh: the local kernel of each device inside `jax.shard_map`.

Rows are spread over the data axes, heads over `tensor`, positions over `context`. With positions
spread, every device gathers all keys and values and attends with its own queries, as Llama 3 did
(arXiv:2407.21783, section 3.3.2): segments need nothing special, and grouped queries keep what is
gathered small. Causality makes late queries dearer than early ones, so there are two layouts of a
row of T positions over C devices:

  natural   device i holds positions [i T/C, (i+1) T/C)
  balanced  device i holds chunks i and 2C-1-i of 2C: the same work for everyone

Everything outside of attention looks at one position at a time, and does not see the layout.

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
from jllama.parallel.sharding import Placement, active_placement

# (q [B,T,H,N], k and v [B,S,K,N], index of each query among the keys [T], segments [B,S] or None,
# the mask) -> [B,T,H,N]
Kernel = Callable[..., jax.Array]


def platform() -> str:
    """Where the computation will run: "cpu", "gpu" or "tpu".

    The active placement says; it may be of another platform than this process has, when the program
    is only compiled. Without one it is the process's own.
    """
    placement = active_placement()
    return jax.default_backend() if placement is None else placement.platform


def sequence_ways(rows: int, length: int) -> int:
    """Over how many devices the positions of [rows, length] are spread by the active placement."""
    placement = active_placement()
    return 1 if placement is None else _ways(placement, _spec(placement, (rows, length))[1])


def over_positions(params: Any) -> Placement | None:
    """Spreads positions, and nothing else, over the devices that parameters lie on, as they lie.

    For whole rows outside of training: one row, however long, is the work of all devices. None
    where the parameters are on no mesh.
    """
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return Placement(context_mesh(sharding.mesh), ShardingConfig())


def balanced_order(length: int, ways: int) -> np.ndarray | None:
    """The positions of a row in the order of the balanced layout, [length] int32.

    None where there is nothing to balance: one device, or chunks that would not be of one size.
    """
    if ways == 1 or length % (2 * ways):
        return None
    chunks = np.arange(length, dtype=np.int32).reshape(2 * ways, -1)
    return np.stack([chunks[:ways], chunks[: ways - 1 : -1]], axis=1).reshape(-1)


def natural_order(length: int) -> np.ndarray:
    """The positions of a row as they are, [length] int32."""
    return np.arange(length, dtype=np.int32)


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
    """Runs `kernel` on every device of the active placement; without one, or on one device, as is.

    Args:
      q: [B,T,H,N]; k, v: [B,T,K,N]; segments: [B,T] or None; all in one layout.
      balanced: that layout is `balanced_order` of the row over the ways of its positions.
      mask: what a kernel knows ahead of time about its queries; has `manual_sharding_spec`, which
        tells the parts of it that belong to a part of the queries.
      prevent_cse: as of `jax.checkpoint`, for the keys and values of the whole row; False where a
        loop, or the recomputation of a block, parts the forward from the backward pass already.

    Returns:
      [B,T,H,N], in the same layout.
    """
    placement = active_placement()
    if placement is None or placement.mesh.size == 1:
        return kernel(q, k, v, jnp.arange(q.shape[1]), segments, mask)
    spec = _spec(placement, q.shape)
    batch, seq, heads, _ = spec
    ways, head_ways = _ways(placement, seq), _ways(placement, heads)
    # Fewer key/value heads than tensor ways: each is repeated just enough for every device to have
    # those of its own queries.
    repeats = head_ways // math.gcd(k.shape[2], head_ways)
    if repeats > 1:
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)

    def own_rows(t: int) -> jax.Array:
        """The natural index of the t positions that this device holds."""
        if ways == 1:
            return jnp.arange(t)
        device = lax.axis_index(seq)
        if not balanced:
            return device * t + jnp.arange(t)
        chunks = jnp.stack([device, 2 * ways - 1 - device]) * (t // 2)
        return (chunks[:, None] + jnp.arange(t // 2)).reshape(t)

    def gather(x: jax.Array) -> jax.Array:
        """[B, T/C, ...] of every device -> [B, T, ...] in natural order."""
        return _natural(lax.all_gather(x, seq, axis=1), balanced)

    def local(q, k, v, segments, mask):
        if ways > 1:
            k, v = gather(k), gather(v)
            if segments is not None:
                segments = _natural(segments.reshape(len(segments), ways, -1), balanced)
        return kernel(q, k, v, own_rows(q.shape[1]), segments, mask)

    if ways > 1:
        # The backward pass gathers again: keys and values of the whole row would else be kept for
        # every layer. What the kernel names (its result) is kept, so that it does not run again.
        policy = jax.checkpoint_policies.save_only_these_names("attention")
        local = jax.checkpoint(local, policy=policy, prevent_cse=prevent_cse)

    parts = None
    if mask is not None:
        queries = NamedSharding(placement.mesh, PartitionSpec(None, seq))
        parts = mask.manual_sharding_spec(queries)
    # Segments are whole along a row on every device: they are read there, and are small.
    specs = (spec, spec, spec, PartitionSpec(batch), parts)
    return placement.per_device(local, specs, spec)(q, k, v, segments, mask)


def _spec(placement: Placement, shape: tuple[int, ...]) -> PartitionSpec:
    axes = ("batch", "seq", "act_heads", None)[: len(shape)]
    return placement.spec(shape, axes, "attention")


def _ways(placement: Placement, axes: str | tuple[str, ...] | None) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(placement.mesh.shape[a] for a in axes)


def _natural(x: jax.Array, balanced: bool) -> jax.Array:
    """[B, C, T/C, ...] as the devices hold it -> [B, T, ...] in natural order."""
    B, C, t = x.shape[:3]
    if balanced:
        early, late = jnp.split(x, 2, axis=2)
        x = jnp.concatenate([early, jnp.flip(late, axis=1)], axis=1)
    return x.reshape(B, C * t, *x.shape[3:])
