"""RMSNorm (arXiv:1910.07467)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jllama.model.param import declare


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last dimension.

    It computes in float32 and returns the dtype of x. `axis` is the logical axis of `scale`.
    """

    eps: float
    axis: str
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = jax.nn.initializers.ones
        scale = self.param(
            "scale",
            declare(ones, (self.axis,), decay=False),
            (x.shape[-1],),
            self.param_dtype,
        )
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)
