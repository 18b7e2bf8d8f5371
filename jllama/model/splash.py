"""Splash attention: JAX's Pallas kernel for TPU, flash attention over a sparse mask.

No other file imports `jax.experimental.pallas`.

B batch, T query positions, S key positions, H query heads, K key/value heads, N head width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jllama.chips import TPU_LANES as LANES
from jllama.parallel.context import balanced_order

Mask = kernels.SplashAttentionKernel


def block_size(length: int, most: int) -> int:
    """The largest multiple of `LANES`, at most `most`, that divides `length`.

    `length` is itself a multiple of `LANES`.
    """
    return max(b for b in range(LANES, max(most, LANES) + 1, LANES) if length % b == 0)


@functools.lru_cache(maxsize=16)
def causal_mask(length: int, ways: int, balanced: bool, most: int, interpret: bool = False) -> Mask:
    """The kernel's precomputed mask for rows of `length` positions sharded over `ways` devices.

    Args:
      length: a multiple of `LANES * ways`.
      balanced: whether positions are in the balanced layout of `jllama.parallel.context`.
      most: the largest block of queries and of keys.
      interpret: interpret the kernel, slowly, so that it runs on any platform.
    """
    order = balanced_order(length, ways) if balanced else np.arange(length, dtype=np.int32)
    part = length // ways
    # Blocks that do not cross the two chunks of the balanced layout skip more of the mask.
    chunk = part // 2 if balanced and part % (2 * LANES) == 0 else part
    sizes = dict.fromkeys(
        ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
         "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
        block_size(chunk, most),
    )  # fmt: skip
    with jax.core.eval_context():  # the cached mask outlives the trace that first asks for it
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([_Causal(order)]),
            block_sizes=kernels.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=ways,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    segments: jax.Array | None,
    mask: Mask,
) -> jax.Array:
    """Softmax attention; q [B,T,H,N], k and v [B,S,K,N] -> [B,T,H,N].

    Args:
      rows: [T] int32, the index of each query among the keys.
      segments: [B,S] int32 of the keys, or None.
      mask: `causal_mask`, or its shard, for these queries.
    """
    # The kernel does not scale the scores, and expects heads before positions.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    if segments is not None:
        segments = kernels.SegmentIds(q=jnp.take(segments, rows, axis=1), kv=segments)
    return jnp.swapaxes(jax.vmap(mask)(q, k, v, segments), 1, 2)


def _sees(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    return q >= k


class _Causal(masks.Mask):
    """The causal mask for queries in any order, computed block by block, never as a whole."""

    def __init__(self, rows: np.ndarray):
        # The kernel calls the function on the positions in a block instead of reading a mask.
        self.q_sequence, self.mask_function = rows, _sees

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q_sequence), len(self.q_sequence)

    def __getitem__(self, at: tuple[slice, slice]) -> np.ndarray:
        rows, keys = self.q_sequence[at[0]], np.arange(self.shape[1], dtype=np.int32)[at[1]]
        # Nearly all blocks are all True or all False; a long row has tens of thousands of blocks.
        if keys[-1] <= rows.min():
            return _filled(True, len(rows), len(keys))
        if keys[0] > rows.max():
            return _filled(False, len(rows), len(keys))
        return _sees(rows[:, None], keys)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Causal) and np.array_equal(self.q_sequence, other.q_sequence)

    def __hash__(self) -> int:
        return hash(self.q_sequence.tobytes())


@functools.cache
def _filled(value: bool, rows: int, keys: int) -> np.ndarray:
    return np.full((rows, keys), value)
