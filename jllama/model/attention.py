"""Grouped-query causal attention, isolated by segment.

B batch, T query positions, S key positions, D model width, H query heads, K key/value heads,
G = H/K, N head width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jllama.config import ComputeConfig, ModelConfig
from jllama.model.cache import Cache
from jllama.model.linear import Linear
from jllama.model.norm import RMSNorm
from jllama.model.param import matrix_init
from jllama.model.rope import apply_rope
from jllama.parallel.sharding import constrain

# Finite, so that a row with nothing to attend to gives a mean and not NaN.
MASKED = -1e30


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention; q [B,T,H,N], k and v [B,S,K,N], mask [B,T,S] bool -> [B,T,H,N].

    Scores and softmax are float32.
    """
    B, T, H, N = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, H // K, N)
    scores = jnp.einsum("BTKGN,BSKN->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * N**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKN->BTKGN", weights, v).reshape(B, T, H, N)


def attend_row(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, block: int
) -> jax.Array:
    """Causal attention within a row of T positions, `block` queries at a time.

    A block never looks at keys beyond its last query, which saves up to half of the work, and its
    scores are computed again in the backward pass, so memory grows with block * T and not T * T.
    segments [B,T] int32: positions attend only within their own segment; None is one segment.
    """
    B, T = q.shape[:2]

    @jax.checkpoint
    def one(q, k, v, start, segments):
        t, s = q.shape[1], k.shape[1]
        mask = (start + jnp.arange(t))[:, None] >= jnp.arange(s)
        mask = jnp.broadcast_to(mask, (B, t, s))
        if segments is not None:
            own = jax.lax.dynamic_slice_in_dim(segments, start, t, axis=1)
            mask &= own[:, :, None] == segments[:, None, :]
        return attend(q, k, v, mask)

    outs = []
    for start in range(0, T, block):
        end = min(start + block, T)
        seen = None if segments is None else segments[:, :end]
        outs.append(one(q[:, start:end], k[:, :end], v[:, :end], start, seen))
    return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]


class Attention(nn.Module):
    """x [B,T,D] -> ([B,T,D], the cache with slots of `layer` written); see `apply`."""

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: Cache | None,
        layer: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        positions: jax.Array,
        segments: jax.Array | None,
    ) -> tuple[jax.Array, Cache | None]:
        c, dtype, param_dtype = self.config, self.compute.dtype, self.compute.param_dtype
        D, H, K, N = c.hidden_dim, c.num_heads, c.num_kv_heads, c.head_dim
        init = matrix_init(c.init, fan_in=D)

        def project(name, heads, axis):
            axes = ("embed", axis, "head_dim")
            return Linear((D,), (heads, N), axes, init, dtype, param_dtype, name=name)(x)

        q, k, v = project("q", H, "heads"), project("k", K, "kv_heads"), project("v", K, "kv_heads")
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, "norm", param_dtype, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, "norm", param_dtype, name="k_norm")(k)
        q = constrain(apply_rope(q, *rope), "batch", "seq", "act_heads", None)
        k = constrain(apply_rope(k, *rope), "batch", "seq", "act_kv_heads", None)
        v = constrain(v, "batch", "seq", "act_kv_heads", None)

        if cache is None:
            out = attend_row(q, k, v, segments, getattr(self.compute.attention, "block", 512))
        else:
            rows = jnp.arange(x.shape[0])[:, None]
            cache = Cache(
                cache.k.at[layer, rows, :, positions].set(k),
                cache.v.at[layer, rows, :, positions].set(v),
            )
            keys, values = cache.k[layer].swapaxes(1, 2), cache.v[layer].swapaxes(1, 2)
            mask = jnp.arange(keys.shape[1]) <= positions[:, :, None]
            out = attend(q, keys, values, mask)
        out = constrain(out, "batch", "seq", "act_heads", None)

        init = matrix_init(c.init, fan_in=H * N, depth=c.num_layers)
        axes = ("heads", "head_dim", "embed")
        out = Linear((H, N), (D,), axes, init, dtype, param_dtype, name="o")(out)
        return out, cache
