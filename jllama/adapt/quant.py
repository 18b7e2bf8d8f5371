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
import qwix

from jllama.model.linear import dense
from jllama.model.param import EachLeaf, dotted
from jllama.parallel.sharding import scales_sharding

Kind = Literal["int8", "int4", "nf4"]

# Inputs that share a scale in 4 bits; QLoRA's block. int8 has one scale per output.
BLOCK = 64


def quantizer(specs: Any, kind: Kind | Literal["none"], whole: Any = ()) -> EachLeaf:
    """What makes a `qwix.QArray` of each matrix of a block, where it lies, and deletes the matrix.

    Not of those whose dotted paths are in `whole`: they are trained, and begin as they were.
    Placed shapes give placed shapes.

    Args:
      specs: the tree of `ParamSpec`.
    """
    inputs = {dotted(path): spec.inputs for path, spec in jax.tree.leaves_with_path(specs)}

    def leaf(path: str, x: Any) -> Any:
        kept = kind == "none" or not inputs[path] or path in whole
        return x if kept else _replaced(x, inputs[path], kind)

    return leaf


def _replaced(x: Any, inputs: int, kind: Kind) -> Any:
    program, placed = quantizing(x, inputs, kind)
    if isinstance(x, jax.ShapeDtypeStruct):
        return placed
    quantized = jax.block_until_ready(program(x))
    x.delete()
    return quantized


def quantizing(x: Any, inputs: int, kind: Kind) -> tuple[Any, Any]:
    """The program that quantises a matrix, an array or a placed shape, and its placed result."""
    run = functools.partial(rounded, inputs=inputs, kind=kind)
    shapes = jax.eval_shape(run, x)
    places = jax.tree.map(lambda s: scales_sharding(x.sharding, s.shape, x.shape), shapes)
    placed = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places
    )
    return jax.jit(run, out_shardings=places), placed


def rounded(x: jax.Array, inputs: int, kind: str) -> Any:
    """Stacked matrices [L,inputs...,outputs...] in a dtype, or quantised as `Kind` says.

    Scales are absolute maxima over inputs, float32: of all inputs of an output for int8, of `BLOCK`
    neighbours for 4 bits, which do not reach beyond a head. What is quantised are the values in
    bfloat16, so that a base is the same in whichever dtype it was read.
    """
    if kind not in typing.get_args(Kind):
        return x.astype(kind)
    # One layer at a time: for nf4 the work on a matrix is sixteen times the matrix.
    return jax.lax.map(functools.partial(_layer, inputs=inputs, kind=kind), x)


def _layer(x: jax.Array, inputs: int, kind: Kind) -> qwix.QArray:
    """A matrix [inputs...,outputs...] quantised."""
    x = x.astype(jnp.bfloat16).astype(jnp.float32)
    *outer, last = range(inputs)
    others = [d for d in range(x.ndim) if d not in (*outer, last)]
    if kind == "int8":
        return qwix.quantize(x, kind, channelwise_axes=others)
    block = math.gcd(x.shape[last], BLOCK)
    return qwix.quantize(x, kind, channelwise_axes=[*others, *outer], tiled_axes={last: block})


@jax.jit
def squares(exact: jax.Array, rounded: Any, before: Any) -> jax.Array:
    """[|rounded - exact|^2, |exact - before|^2, |exact|^2], Frobenius norms, float32."""
    off = dense(rounded, jnp.float32) - exact, exact - dense(before, jnp.float32), exact
    return jnp.stack([jnp.sum(jnp.square(x)) for x in off])
