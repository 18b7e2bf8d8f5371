"""Products of an activation with the matrices of a block, and their gradients.

A matrix is an array, or a `qwix.QArray` where it is quantised; it may have a low-rank overlay.

B batch, T positions, R rank of an overlay. The features of an activation may take several
dimensions, such as heads and their width.
"""

import functools
import operator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jllama.model.param import Initializer, declare
from jllama.model.quantised import dequantised, is_quantised
from jllama.parallel.product import contract
from jllama.parallel.sharding import Parts, mesh_axes, pin

# The overlay of one matrix of one layer, from the collection `lora`: the trained factors `a`
# [inputs...,R] and `b` [R,outputs...], and `scale` [1 or B,R]. Further keys are optional: `m`
# [outputs...] are DoRA's trained norms; `gain` [1 or B,outputs...] multiplies x W, as DoRA does in
# inference; `key` and `keep` drop inputs, where `keep` is the probability to keep one.
MatrixOverlay = dict[str, jax.Array]


class Matrix(nn.Module):
    """A matrix of a block, `param_dtype`, [inputs..., outputs...].

    Attributes:
      inputs, outputs: sizes of the contracted dimensions and of the resulting dimensions.
      axes: logical axes of all dimensions.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    kernel_init: Initializer
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> tuple[Any, MatrixOverlay | None]:
        overlay = self.variables.get("lora")
        value = self.variables.get("params", {}).get("kernel")
        if is_quantised(value):  # Linen would reject it for its shape
            return value, overlay
        init = declare(self.kernel_init, self.axes, decay=True, inputs=len(self.inputs))
        shape = self.inputs + self.outputs
        return self.param("kernel", init, shape, self.param_dtype), overlay


def project(x: jax.Array, *matrices: Matrix, dtype: Any) -> tuple[jax.Array, ...]:
    """`x[B,T,inputs...] @ matrix -> [B,T,outputs...]` in `dtype`, for each matrix; no bias.

    Between the products an activation with the features `embed` has its positions sharded over
    `block_seq`, so that no device repeats the norms and sums of another (arXiv:2205.05198). The
    products need all positions of `seq`. So x is gathered once for all matrices, and a result
    with the features `embed` is reduce-scattered; the same holds for the gradients.

    With a `MatrixOverlay`, `x W` becomes `x W + scale (x a) b` (LoRA, arXiv:2106.09685, equation
    3): two thin products more, and W needs no gradient and is never rewritten.
    """
    x = x.astype(dtype)
    kernels, overlays = zip(*(matrix() for matrix in matrices), strict=True)
    kinds = tuple(_Kind(matrix.axes, len(matrix.inputs)) for matrix in matrices)
    thin = [
        o and (o["a"], _Kind((*kind.axes[: kind.inputs], "lora_rank"), kind.inputs))
        for o, kind in zip(overlays, kinds, strict=True)
    ]
    # All products of x without dropout are one call, which gathers x once.
    undropped = [t for t, o in zip(thin, overlays, strict=True) if t and "keep" not in o]
    ys = _products(x, (*kernels, *(a for a, _ in undropped)), (*kinds, *(k for _, k in undropped)))
    ys, rest = ys[: len(kernels)], iter(ys[len(kernels) :])
    out = []
    for y, kernel, overlay, kind, down in zip(ys, kernels, overlays, kinds, thin, strict=True):
        if overlay is not None:
            if "keep" in overlay:
                (h,) = _products(_dropped(x, overlay), (down[0],), (down[1],))
            else:
                h = next(rest)
            y = _adapted(y, h, kernel, overlay, kind)
        # Named, because a rematerialisation policy does not see products inside a custom_vjp.
        out.append(checkpoint_name(y, "matmul"))
    return tuple(out)


def _dropped(x, overlay):
    mask = jax.random.bernoulli(overlay["key"], overlay["keep"], x.shape)
    return jnp.where(mask, x / overlay["keep"].astype(x.dtype), 0)


def _adapted(y, h, kernel, overlay, kind):
    """The product with the overlaid matrix, from y = x W and h = x a."""
    dtype = y.dtype
    h = (h * overlay["scale"][:, None]).astype(dtype)
    (change,) = _products(h, (overlay["b"],), (_Kind(("lora_rank", *kind.axes[kind.inputs :]), 1),))
    if "m" in overlay:
        # DoRA (arXiv:2402.09353, equations 5 and 11) gives the columns of W + scale a b the norms
        # m. Their norms before count as constants in the gradient.
        norms = jax.lax.stop_gradient(column_norms(kernel, overlay, kind.inputs))
        return ((y + change) * gain(overlay["m"], norms)).astype(dtype)
    if "gain" in overlay:
        y = (y * overlay["gain"][:, None]).astype(dtype)
    return y + change


def gain(m: jax.Array, norms: jax.Array) -> jax.Array:
    """DoRA's factor of each column, m / norms; for a column of zeros, which stays zero, it is m."""
    return m / jnp.where(norms > 0, norms, 1.0)


def dense(kernel: Any, dtype: Any) -> jax.Array:
    """The matrix as an array of `dtype`, dequantised if need be."""
    if is_quantised(kernel):
        kernel = dequantised(kernel)
    return kernel.astype(dtype)


def column_norms(kernel: Any, overlay: MatrixOverlay, inputs: int) -> jax.Array:
    """The Euclidean norm of each column of W + scale a b, over all inputs: [outputs...] float32."""
    change = jnp.tensordot(overlay["a"] * overlay["scale"][0], overlay["b"], 1)
    return jnp.sqrt(
        jnp.sum(jnp.square(dense(kernel, jnp.float32) + change), axis=tuple(range(inputs)))
    )


class _Kind(NamedTuple):
    """The logical axes of a matrix, and how many leading dimensions of it are contracted."""

    axes: tuple[str, ...]
    inputs: int


class _Layout(NamedTuple):
    """The mesh axes of an activation [B,T,...] in the products, and between them."""

    inside: Parts
    outside: Parts


def _layout(shape: tuple[int, ...], axis: str) -> _Layout:
    """The layout of an activation of `shape` whose first feature has the logical `axis`."""

    def parts(seq, feature):
        axes = ("batch", seq, feature, *(None for _ in shape[3:]))
        return mesh_axes(shape, axes, "activation")

    if axis == "embed":
        return _Layout(parts("seq", None), parts("block_seq", "act_embed"))
    inside = parts("seq", axis if axis == "lora_rank" else f"act_{axis}")
    return _Layout(inside, inside)


def _y_layout(x, kernel, kind):
    return _layout(x.shape[:2] + kernel.shape[kind.inputs :], kind.axes[kind.inputs])


def _gathered(kernel, dtype, x_layout, y_layout):
    """Gathers the kernel along the model's width; returns it in `dtype`, and its mesh axes.

    The cast comes first, so that the gather sends `dtype`. The sharding is pinned here, so that the
    recomputed product and the gradient share one gather; the partitioner might make two.
    """
    parts = (*x_layout.inside[2:], *y_layout.inside[2:])
    if is_quantised(kernel):  # gathered while quantised, then dequantised
        return dense(
            jax.tree.map(lambda x: pin(x, _part_axes(x, kernel, parts)), kernel), dtype
        ), parts
    return pin(kernel.astype(dtype), parts), parts


def _part_axes(x, kernel, parts):
    """The mesh axes of a quantised kernel's values or scales; a dimension with fewer is whole."""
    return tuple(p if n == m else () for n, m, p in zip(x.shape, kernel.shape, parts, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _products(x, kernels, kinds):
    """The products of x; the gradient of a kernel is `x^T dy` in the kernel's dtype.

    So a float32 kernel has a float32 gradient, summed over devices in float32, even if x is
    bfloat16. Autodiff would form it as `(dy^T x)^T`, for which XLA's CPU backend transposes dy
    inside the fusion that makes it: 8% of a small model's step. On GPU and TPU both are the same
    product.
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
    d_kernels, same_sharding = [], {}
    for kernel, kind, dy in zip(kernels, kinds, dys, strict=True):
        y_layout = _y_layout(x, kernel, kind)
        dy = pin(dy, y_layout.inside)
        target = mesh_axes(kernel.shape, kind.axes, "gradient")
        parts = x_layout.inside, y_layout.inside
        if is_quantised(kernel):
            d_kernels.append(None)  # a quantised kernel is never trained
        else:
            d_kernels.append(contract([(x, dy)], ((0, 1), (0, 1)), parts, target, kernel.dtype))
        w, w_parts = _gathered(kernel, x.dtype, x_layout, y_layout)
        dims = tuple(range(2, dy.ndim)), tuple(range(kind.inputs, kernel.ndim))
        same_sharding.setdefault((dims, (y_layout.inside, w_parts)), []).append((dy, w))
    # Products with the same sharding are added first, so that one reduction over devices sums them.
    d_xs = [contract(pairs, *how, x_layout.outside) for how, pairs in same_sharding.items()]
    return functools.reduce(operator.add, d_xs), tuple(d_kernels)


_products.defvjp(_products_fwd, _products_bwd)
