"""The attention layer: grouped queries (arXiv:2305.13245), turned by RoPE; and its key/value cache.

The cache is data that goes into the model and comes out of it.

B batch, T positions, S slots of the cache, L layers, D model width, H query heads, K key/value
heads, N head width.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jllama.config import ComputeConfig, ModelConfig
from jllama.model.kernels import attend, attend_row
from jllama.model.linear import Matrix, project
from jllama.model.norm import RMSNorm
from jllama.model.param import matrix_init
from jllama.model.rope import apply_rope
from jllama.parallel.sharding import constrain

Tables = tuple[jax.Array, jax.Array]  # cosine and sine


@flax.struct.dataclass
class Cache:
    """Keys and values, each [L, B, K, S, N]; slot s holds position s.

    Keys are turned by RoPE already, unless it `grows`. The slots of a head lie side by side, as
    attention reads them.

    Slots that were never written, or written by padding, lie beyond every query's position until
    they are overwritten, so causality alone hides them.
    """

    k: jax.Array
    v: jax.Array


def init_cache(config: ModelConfig, compute: ComputeConfig, batch: int, length: int) -> Cache:
    """An empty cache of `length` slots for `batch` rows, in the compute dtype."""
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    return Cache(jnp.zeros(shape, compute.dtype), jnp.zeros(shape, compute.dtype))


class Attention(nn.Module):
    """x [B,T,D] -> ([B,T,D], the cache with slots of `layer` written); see `apply`.

    `rope` are the tables of x's positions, and those of all slots of a cache whose keys are turned
    as they are read; else None.
    """

    config: ModelConfig
    compute: ComputeConfig
    balanced: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: Cache | None,
        layer: jax.Array,
        rope: tuple[Tables, Tables | None],
        positions: jax.Array,
        segments: jax.Array | None,
    ) -> tuple[jax.Array, Cache | None]:
        c, dtype, param_dtype = self.config, self.compute.dtype, self.compute.param_dtype
        D, H, K, N = c.hidden_dim, c.num_heads, c.num_kv_heads, c.head_dim
        init = matrix_init(c.init, fan_in=D)

        def matrix(name, heads, axis):
            axes = ("embed", axis, "head_dim")
            return Matrix((D,), (heads, N), axes, init, param_dtype, name=name)

        q, k, v = project(
            x, matrix("q", H, "heads"), matrix("k", K, "kv_heads"), matrix("v", K, "kv_heads"),
            dtype=dtype,
        )  # fmt: skip
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, "norm", param_dtype, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, "norm", param_dtype, name="k_norm")(k)
        here, of_slots = rope
        q = constrain(apply_rope(q, *here), "batch", "seq", "act_heads", None)
        k = k if of_slots else apply_rope(k, *here)
        k = constrain(k, "batch", "seq", "act_kv_heads", None)
        v = constrain(v, "batch", "seq", "act_kv_heads", None)

        if self.is_initializing():
            out = q  # of a single position, whose length no kernel needs to like
        elif cache is None:
            unrolled = self.compute.scan_unroll > 1 and self.compute.remat == "none"
            out = attend_row(
                q, k, v, segments, self.compute.attention, self.balanced, prevent_cse=unrolled
            )
        else:
            rows = jnp.arange(x.shape[0])[:, None]
            cache = Cache(
                cache.k.at[layer, rows, :, positions].set(k),
                cache.v.at[layer, rows, :, positions].set(v),
            )
            keys, values = cache.k[layer].swapaxes(1, 2), cache.v[layer].swapaxes(1, 2)
            if of_slots:
                keys = apply_rope(keys, *of_slots)
            mask = jnp.arange(keys.shape[1]) <= positions[:, :, None]
            out = attend(q, keys, values, mask)
        out = constrain(out, "batch", "seq", "act_heads", None)

        init = matrix_init(c.init, fan_in=H * N, depth=c.num_layers)
        axes = ("heads", "head_dim", "embed")
        (out,) = project(out, Matrix((H, N), (D,), axes, init, param_dtype, name="o"), dtype=dtype)
        return out, cache
