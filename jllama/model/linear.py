"""A matrix product over the last dimensions of its input."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jllama.model.param import Initializer, declare


class Linear(nn.Module):
    """`y[..., out] = x[..., in] @ kernel[in, out]`, no bias; `in` and `out` may be several axes.

    Attributes:
      inputs, outputs: sizes of the contracted and of the produced dimensions.
      axes: logical axes of the kernel, inputs then outputs.
      dtype: of the product; the kernel is stored in `param_dtype`.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    kernel_init: Initializer
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            declare(self.kernel_init, self.axes, decay=True),
            self.inputs + self.outputs,
            self.param_dtype,
        )
        batch = x.shape[: x.ndim - len(self.inputs)]
        x = x.astype(self.dtype).reshape(*batch, math.prod(self.inputs))
        flat = kernel.astype(self.dtype).reshape(math.prod(self.inputs), -1)
        y = lax.dot_general(x, flat, (((x.ndim - 1,), (0,)), ((), ())))
        return y.reshape(*batch, *self.outputs)
