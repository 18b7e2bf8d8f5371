"""Quantised matrices: a frozen base in 8 or 4 bits (QLoRA, arXiv:2305.14314).

Only the blocks' matrices are quantised; embedding, head and norms stay as they are. The values and
their scales are a `qwix.QArray`, which `jllama.model.linear` multiplies with.
"""

import functools
import math
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from jllama.model import llama
from jllama.model.linear import dense
from jllama.model.llama import ParamSpec
from jllama.parallel.sharding import coarser

Kind = Literal["int8", "int4", "nf4"]

# Inputs that share a scale in 4 bits; QLoRA's block. int8 has one scale per output.
BLOCK = 64


def quantize(params: llama.Params, specs: Any, kind: Kind) -> llama.Params:
    """The tree with a `qwix.QArray` for each matrix of a block, quantised where it lies.

    One matrix at a time, each deleted once it is quantised.

    Args:
      params: arrays, or placed shapes for placed shapes; `specs` is the tree of `ParamSpec`.
    """

    def leaf(x: Any, spec: ParamSpec) -> Any:
        return _replaced(x, spec.inputs, kind) if spec.inputs else x

    return jax.tree.map(leaf, params, specs)


def _replaced(x: Any, inputs: int, kind: Kind) -> Any:
    run = functools.partial(rounded, inputs=inputs, kind=kind)
    shapes = jax.eval_shape(run, x)
    places = jax.tree.map(lambda s: coarser(x.sharding, s.shape, x.shape), shapes)
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places
        )
    quantized = jax.block_until_ready(jax.jit(run, out_shardings=places)(x))
    x.delete()
    return quantized


def rounded(x: jax.Array, inputs: int, kind: str) -> Any:
    """Stacked matrices [L,inputs...,outputs...] in a dtype, or quantised as `Kind` says.

    Scales are absolute maxima over inputs, in the dtype of x: of all inputs of an output for int8,
    of `BLOCK` neighbours for 4 bits, which do not reach beyond a head.
    """
    if kind not in typing.get_args(Kind):
        return x.astype(kind)
    *outer, last = range(1, 1 + inputs)
    others = [d for d in range(x.ndim) if d not in (*outer, last)]
    if kind == "int8":
        return qwix.quantize(x, kind, channelwise_axes=others)
    block = math.gcd(x.shape[last], BLOCK)
    return qwix.quantize(x, kind, channelwise_axes=[*others, *outer], tiled_axes={last: block})


def squared_error(exact: jax.Array, rounded: Any) -> np.ndarray:
    """[|rounded - exact|^2, |exact|^2], Frobenius norms."""

    @jax.jit
    def squares(exact: jax.Array, rounded: Any) -> list[jax.Array]:
        return [jnp.sum(jnp.square(x)) for x in (dense(rounded, jnp.float32) - exact, exact)]

    return np.array([float(x) for x in squares(exact, rounded)])
