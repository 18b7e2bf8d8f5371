"""A matrix product over the last dimensions of its input."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jllama.model.param import Initializer, declare


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x[..., I] @ kernel[I, O]` in x's dtype; the kernel's gradient is `x^T dy` in the kernel's.

    So a float32 kernel has a float32 gradient, summed over devices in float32, under bfloat16 too.

    Autodiff forms it as `(dy^T x)^T`, for which XLA's CPU backend transposes dy inside the fusion
    that makes it: 8% of a small model's step. On GPU and TPU both are the same product.
    """
    return lax.dot_general(x, kernel.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


def _matmul_fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, kernel), (x, kernel)


def _matmul_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    d_kernel = lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=kernel.dtype)
    d_x = lax.dot_general(dy, kernel.astype(dy.dtype), (((dy.ndim - 1,), (1,)), ((), ())))
    return d_x, d_kernel


matmul.defvjp(_matmul_fwd, _matmul_bwd)


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
            declare(self.kernel_init, self.axes, decay=True, inputs=len(self.inputs)),
            self.inputs + self.outputs,
            self.param_dtype,
        )
        batch = x.shape[: x.ndim - len(self.inputs)]
        x = x.astype(self.dtype).reshape(*batch, math.prod(self.inputs))
        flat = kernel.reshape(math.prod(self.inputs), -1)
        # Named, because a rematerialisation policy sees no product inside a custom gradient.
        y = checkpoint_name(matmul(x, flat), "matmul")
        return y.reshape(*batch, *self.outputs)
