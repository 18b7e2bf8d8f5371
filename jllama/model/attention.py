"""The attention layer, with grouped queries (arXiv:2305.13245) and RoPE, and its key/value cache.

The cache is an argument and a result of the model.

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

    RoPE is applied to keys before they are written, unless the model's RoPE `grows`. The slots of a
    head are contiguous, as attention reads them.

    A slot that was never written, or holds padding, is beyond the position of every query until a
    token overwrites it, so the causal mask hides it.
    """

    k: jax.Array
    v: jax.Array


def init_cache(config: ModelConfig, compute: ComputeConfig, batch: int, length: int) -> Cache:
    """An empty cache of `length` slots for `batch` rows, in the compute dtype."""
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    return Cache(jnp.zeros(shape, compute.dtype), jnp.zeros(shape, compute.dtype))


class Attention(nn.Module):
    """x [B,T,D] -> ([B,T,D], the cache with the keys and values of x written); see `llama.apply`.

    `rope` holds the tables of x's positions, and the tables of all slots if RoPE is applied to keys
    as they are read from the cache, else None.
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
        tables, slot_tables = rope
        # When only the shapes matter, no device need be there to be asked for its platform.
        if not self.is_initializing():
            q = apply_rope(q, *tables)
            k = k if slot_tables else apply_rope(k, *tables)
        q = constrain(q, "batch", "seq", "act_heads", None)
        k = constrain(k, "batch", "seq", "act_kv_heads", None)
        v = constrain(v, "batch", "seq", "act_kv_heads", None)

        if self.is_initializing():
            out = q  # only the shape matters here, and kernels do not take rows of one position
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
            if slot_tables:
                keys = apply_rope(keys, *slot_tables)
            mask = jnp.arange(keys.shape[1]) <= positions[:, :, None]
            out = attend(q, keys, values, mask)
        out = constrain(out, "batch", "seq", "act_heads", None)

        init = matrix_init(c.init, fan_in=H * N, depth=c.num_layers)
        axes = ("heads", "head_dim", "embed")
        (out,) = project(out, Matrix((H, N), (D,), axes, init, param_dtype, name="o"), dtype=dtype)
        return out, cache
