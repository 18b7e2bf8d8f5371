"""Causal attention block by block, in plain XLA: memory grows with the length, not its square.

The forward pass is an online softmax over blocks of keys (arXiv:2205.14135). The backward pass
computes the scores again from the saved log-sum-exp (arXiv:2307.08691).

A query sees a window of keys, `first[b, t] <= s <= rows[t]`: the causal mask gives its end, and the
query's segment, a run of equal numbers, gives its start. So two bounds tell which blocks of keys a
block of queries visits, and the other blocks cost nothing.

The blocks are visited in loops, so that the program does not grow with the length. In a short row
of whole positions Python runs the loops, and every slice is a constant: a CPU then computes several
blocks at once, in three quarters of the time.

B batch, T query positions, S key positions, H query heads, K key/value heads, G = H/K, N head
width; I blocks of t queries, J blocks of s keys.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# The most blocks, and positions, of a row in which Python runs the loops. Beyond them the scores of
# several blocks, which a CPU holds at once, would take more memory than time is saved.
_UNROLLED_BLOCKS, _UNROLLED_LENGTH = 4, 512

# Finite, so that a block without a visible key gives no NaN; its result gets weight 0.
MASKED = -1e30


def segment_starts(segments: jax.Array) -> jax.Array:
    """The index at which each position's run of equal numbers starts: [B,S] -> [B,S] int32."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return lax.cummax(jnp.where(starts, index, 0), axis=1)


def visits(rows: jax.Array, first: jax.Array, t: int, s: int) -> tuple[jax.Array, jax.Array]:
    """The range [low, high) of blocks of s keys that each block of t queries visits: [I] int32."""
    low = jnp.min(cut(first, 1, t, mode="edge"), axis=(1, 2)) // s
    high = jnp.max(cut(rows, 0, t, mode="edge"), axis=1) // s + 1
    return low, high


def blockwise(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array | np.ndarray,
    first: jax.Array,
    block: int,
) -> jax.Array:
    """Softmax attention; q [B,T,H,N], k and v [B,S,K,N] -> [B,T,H,N].

    Scores, softmax and sums are float32; the operands of the products have the dtype of q.

    Args:
      rows: [T] int32, the index of each query among the keys, which is the last key it sees. The
        values of a NumPy array are known while the program is made.
      first: [B,T] int32, the first key that each query sees; at most `rows`.
      block: the number of queries, and of keys, in a block.
    """
    whole = isinstance(rows, np.ndarray) and np.array_equal(rows, np.arange(k.shape[1]))
    unrolled = whole and q.shape[1] <= min(_UNROLLED_BLOCKS * block, _UNROLLED_LENGTH)
    return _blockwise(q, k, v, rows, first, block, unrolled)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _blockwise(q, k, v, rows, first, block, unrolled):
    return _forward(q, k, v, rows, first, block, unrolled)[0]


def _forward(q, k, v, rows, first, block, unrolled):
    T, K = q.shape[1], k.shape[2]
    t, s = min(block, T), min(block, k.shape[1])
    keys, values = _key_blocks(k, s), _key_blocks(v, s)

    def query_block(_, xs):
        q, rows, first, low, high = xs

        def visit(j, carry):
            top, total, out = carry
            scores = _scores(q, keys[j], rows, first, j)
            new = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
            more = _product("BKGTS,BKSN->BKGTN", weights.astype(v.dtype), values[j])
            total = total * shrink + jnp.sum(weights, axis=-1)
            return new, total, out * shrink[..., None] + more

        zeros = jnp.zeros(q.shape, jnp.float32)
        carry = (jnp.full_like(zeros[..., 0], MASKED), zeros[..., 0], zeros)
        top, total, out = _over_keys(visit, low, high, carry)
        return None, ((out / total[..., None]).astype(v.dtype), top + jnp.log(total))

    xs = (_query_blocks(q, K, t), *_bounds(rows, first, t, s))
    _, (out, log_z) = _over_queries(query_block, None, xs, unrolled)
    return _query_rows(out, T), _query_rows(log_z, T)


def _blockwise_fwd(q, k, v, rows, first, block, unrolled):
    results = _forward(q, k, v, rows, first, block, unrolled)
    # Named, so that a rematerialisation policy can save them.
    out, log_z = (checkpoint_name(x, "attention") for x in results)
    return out, (q, k, v, rows, first, out, log_z)


def _blockwise_bwd(block, unrolled, saved, d_out):
    q, k, v, rows, first, out, log_z = saved
    (_, T, _, N), (S, K) = q.shape, k.shape[1:3]
    t, s = min(block, T), min(block, S)
    keys, values = _key_blocks(k, s), _key_blocks(v, s)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def query_block(carry, xs):
        q, d_out, log_z, delta, rows, first, low, high = xs
        # The gradients of keys and values are summed as [N,s]: their products then read the scores
        # as they lie, and q and d_out, which are smaller, are transposed once.
        q_columns, d_out_columns = jnp.moveaxis(q, -1, 2), jnp.moveaxis(d_out, -1, 2)

        def visit(j, carry):
            d_q, d_keys, d_values = carry
            weights = jnp.exp(_scores(q, keys[j], rows, first, j) - log_z[..., None])
            d_v = _product("BKNGT,BKGTS->BKNS", d_out_columns, weights.astype(d_out.dtype))
            d_weights = _product("BKGTN,BKSN->BKGTS", d_out, values[j])
            d_scores = (weights * (d_weights - delta[..., None]) * N**-0.5).astype(q.dtype)
            d_k = _product("BKNGT,BKGTS->BKNS", q_columns, d_scores)
            d_q += _product("BKGTS,BKSN->BKGTN", d_scores, keys[j])
            return d_q, d_keys.at[j].add(d_k), d_values.at[j].add(d_v)

        start = jnp.zeros(q.shape, jnp.float32)
        d_q, *carry = _over_keys(visit, low, high, (start, *carry))
        return tuple(carry), d_q.astype(q.dtype)

    queries = (_query_blocks(x, K, t) for x in (q, d_out, log_z, delta))
    zeros = jnp.zeros(keys.swapaxes(-2, -1).shape, jnp.float32)
    xs = (*queries, *_bounds(rows, first, t, s))
    (d_k, d_v), d_q = _over_queries(query_block, (zeros, zeros), xs, unrolled)
    d_k, d_v = (_key_rows(x.swapaxes(-2, -1), S).astype(k.dtype) for x in (d_k, d_v))
    return _query_rows(d_q, T), d_k, d_v, None, None


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


def _over_queries(query_block, carry, xs, unrolled):
    """`lax.scan`; or where `unrolled` a loop in Python, in which block i visits blocks 0 to i."""
    if not unrolled:
        return lax.scan(query_block, carry, xs)
    results = []
    for i in range(len(xs[0])):
        *arrays, _, _ = (x[i] for x in xs)
        carry, result = query_block(carry, (*arrays, 0, i + 1))
        results.append(result)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *results)


def _over_keys(visit, low, high, carry):
    """`lax.fori_loop`; or between two numbers a loop in Python."""
    if not isinstance(high, int):
        return lax.fori_loop(low, high, visit, carry)
    for j in range(low, high):
        carry = visit(j, carry)
    return carry


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _scores(q: jax.Array, k: jax.Array, rows: jax.Array, first: jax.Array, j: jax.Array):
    """q [B,K,G,t,N], k [B,K,s,N], rows [t], first [B,t] -> float32 [B,K,G,t,s]."""
    index = j * k.shape[2] + jnp.arange(k.shape[2])
    seen = (index <= rows[:, None]) & (index >= first[:, :, None])
    scores = _product("BKGTN,BKSN->BKGTS", q, k) * q.shape[-1] ** -0.5
    return jnp.where(seen[:, None, None], scores, MASKED)


def cut(x: jax.Array, axis: int, size: int, mode: str = "constant") -> jax.Array:
    """Pads `axis` to a multiple of `size` and cuts it into blocks along a new leading axis."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, pad, mode=mode)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _bounds(rows: jax.Array, first: jax.Array, t: int, s: int) -> tuple[jax.Array, ...]:
    """The bounds of each block of queries: rows [I,t], first [I,B,t], `visits` two times [I]."""
    low, high = visits(rows, first, t, s)
    return cut(rows, 0, t, mode="edge"), cut(first, 1, t, mode="edge"), low, high


def _query_blocks(x: jax.Array, K: int, t: int) -> jax.Array:
    """[B,T,H,...] -> [I,B,K,G,t,...], grouping the query heads that share a key head."""
    B, T, H = x.shape[:3]
    return jnp.moveaxis(cut(x.reshape(B, T, K, H // K, *x.shape[3:]), 1, t), 2, 4)


def _query_rows(x: jax.Array, T: int) -> jax.Array:
    """[I,B,K,G,t,...] -> [B,T,H,...]: the inverse of `_query_blocks`."""
    x = jnp.moveaxis(x, (1, 0, 4, 2, 3), (0, 1, 2, 3, 4))
    B, blocks, t, K, G = x.shape[:5]
    return x.reshape(B, blocks * t, K * G, *x.shape[5:])[:, :T]


def _key_blocks(x: jax.Array, s: int) -> jax.Array:
    """[B,S,K,N] -> [J,B,K,s,N]."""
    return jnp.moveaxis(cut(x, 1, s), 2, 3)


def _key_rows(x: jax.Array, S: int) -> jax.Array:
    """[J,B,K,s,N] -> [B,S,K,N]: the inverse of `_key_blocks`."""
    J, B, K, s, N = x.shape
    return jnp.moveaxis(x, (1, 0, 3, 2, 4), (0, 1, 2, 3, 4)).reshape(B, J * s, K, N)[:, :S]
