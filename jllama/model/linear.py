"""A matrix product over the last dimensions of its input."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jllama.model.param import Initializer, declare
from jllama.parallel.sharding import constrain


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, kernel: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """`x[..., I] @ kernel[I, O]` in x's dtype; the kernel's gradient is `x^T dy` in the kernel's.

    I and O may be several dimensions of the kernel, whose logical `axes` are all its dimensions';
    x and the result have them as one. So a float32 kernel has a float32 gradient, summed over
    devices in float32, under bfloat16 too.

    Autodiff forms it as `(dy^T x)^T`, for which XLA's CPU backend transposes dy inside the fusion
    that makes it: 8% of a small model's step. On GPU and TPU both are the same product.
    """
    return lax.dot_general(x, _gathered(kernel, x, axes), (((x.ndim - 1,), (0,)), ((), ())))


def _gathered(kernel: jax.Array, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The kernel [I,O] in x's dtype, its width whole: cast first, so that a gather is of x's dtype.

    Said here and not left to the partitioner, a gather is the same for the recomputed product and
    for the gradient, which share it.
    """
    kernel = constrain(kernel.astype(x.dtype), *(None if a == "embed" else a for a in axes))
    return kernel.reshape(x.shape[-1], -1)


def _matmul_fwd(
    x: jax.Array, kernel: jax.Array, axes: tuple[str, ...]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, kernel, axes), (x, kernel)


def _matmul_bwd(
    axes: tuple[str, ...], saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    d_kernel = lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=kernel.dtype)
    d_x = lax.dot_general(dy, _gathered(kernel, x, axes), (((dy.ndim - 1,), (1,)), ((), ())))
    return d_x, constrain(d_kernel.reshape(kernel.shape), *axes)


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
        # Named, because a rematerialisation policy sees no product inside a custom gradient.
        y = checkpoint_name(matmul(x, kernel, self.axes), "matmul")
        return y.reshape(*batch, *self.outputs)
