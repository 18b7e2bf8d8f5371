"""Products of an activation with the matrices of a block, and their gradients.

B batch, T positions; the features of an activation may be several dimensions, such as heads and
their width.
"""

import functools
import operator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jllama.model.param import Initializer, declare
from jllama.parallel.product import contract
from jllama.parallel.sharding import Parts, mesh_axes, pin


class Matrix(nn.Module):
    """A matrix of a block, `param_dtype`, [inputs..., outputs...].

    Attributes:
      inputs, outputs: sizes of the contracted and of the produced dimensions.
      axes: logical axes of all dimensions.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    kernel_init: Initializer
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        init = declare(self.kernel_init, self.axes, decay=True, inputs=len(self.inputs))
        return self.param("kernel", init, self.inputs + self.outputs, self.param_dtype)


def project(x: jax.Array, *matrices: Matrix, dtype: Any) -> tuple[jax.Array, ...]:
    """`x[B,T,inputs...] @ matrix -> [B,T,outputs...]` in `dtype`, for each matrix; no bias.

    All take the same x. Between blocks an activation, whose features are `embed`, has its positions
    spread over `block_seq`, so that no device repeats another's norms and sums (arXiv:2205.05198);
    the products take every position of `seq`. So x is gathered once for all matrices, and a result
    that goes back between blocks is summed over devices and scattered at once. Gradients likewise.
    """
    kernels = tuple(matrix() for matrix in matrices)
    kinds = tuple(_Kind(matrix.axes, len(matrix.inputs)) for matrix in matrices)
    ys = _products(x.astype(dtype), kernels, kinds)
    # Named, because a rematerialisation policy sees no product inside a custom gradient.
    return tuple(checkpoint_name(y, "matmul") for y in ys)


class _Kind(NamedTuple):
    axes: tuple[str, ...]
    inputs: int


class _Layout(NamedTuple):
    """The mesh axes of an activation [B,T,...] inside of the products, and between blocks."""

    inside: Parts
    outside: Parts


def _layout(shape: tuple[int, ...], axis: str) -> _Layout:
    """Of an activation of `shape` whose first feature has the logical `axis`."""

    def parts(seq, feature):
        axes = ("batch", seq, feature, *(None for _ in shape[3:]))
        return mesh_axes(shape, axes, "activation")

    if axis == "embed":
        return _Layout(parts("seq", None), parts("block_seq", "act_embed"))
    inside = parts("seq", f"act_{axis}")
    return _Layout(inside, inside)


def _y_layout(x, kernel, kind):
    return _layout(x.shape[:2] + kernel.shape[kind.inputs :], kind.axes[kind.inputs])


def _gathered(kernel, dtype, x_layout, y_layout):
    """The kernel in `dtype` with the model's width whole, and the mesh axes of its dimensions.

    Cast first, so that a gather is of `dtype`. Said here and not left to the partitioner, a gather
    is the same for the recomputed product and for the gradient, which share it.
    """
    parts = (*x_layout.inside[2:], *y_layout.inside[2:])
    return pin(kernel.astype(dtype), parts), parts


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _products(x, kernels, kinds):
    """The products; a kernel's gradient is `x^T dy` in the kernel's dtype.

    So a float32 kernel has a float32 gradient, summed over devices in float32, under bfloat16 too.
    Autodiff forms it as `(dy^T x)^T`, for which XLA's CPU backend transposes dy inside the fusion
    that makes it: 8% of a small model's step. On GPU and TPU both are the same product.
    """
    return _products_fwd(x, kernels, kinds)[0]


def _products_fwd(x, kernels, kinds):
    x_layout = _layout(x.shape, kinds[0].axes[0])
    x = pin(x, x_layout.inside)
    ys = []
    for kernel, kind in zip(kernels, kinds, strict=True):
        y_layout = _y_layout(x, kernel, kind)
        w, w_parts = _gathered(kernel, x.dtype, x_layout, y_layout)
        dims = tuple(range(2, x.ndim)), tuple(range(kind.inputs))
        ys.append(contract([(x, w)], dims, (x_layout.inside, w_parts), y_layout.outside))
    return tuple(ys), (x, kernels)


def _products_bwd(kinds, saved, dys):
    x, kernels = saved
    x_layout = _layout(x.shape, kinds[0].axes[0])
    d_kernels, alike = [], {}
    for kernel, kind, dy in zip(kernels, kinds, dys, strict=True):
        y_layout = _y_layout(x, kernel, kind)
        dy = pin(dy, y_layout.inside)
        own = mesh_axes(kernel.shape, kind.axes, "gradient")
        parts = x_layout.inside, y_layout.inside
        d_kernels.append(contract([(x, dy)], ((0, 1), (0, 1)), parts, own, kernel.dtype))
        w, w_parts = _gathered(kernel, x.dtype, x_layout, y_layout)
        dims = tuple(range(2, dy.ndim)), tuple(range(kind.inputs, kernel.ndim))
        alike.setdefault((dims, (y_layout.inside, w_parts)), []).append((dy, w))
    # Products that are spread alike are added first, and their sum over devices is one.
    d_xs = [contract(pairs, *how, x_layout.outside) for how, pairs in alike.items()]
    return functools.reduce(operator.add, d_xs), tuple(d_kernels)


_products.defvjp(_products_fwd, _products_bwd)
