"""Quantised matrices: a frozen base in 8 or 4 bits (QLoRA, arXiv:2305.14314).

Only the blocks' matrices are quantised; embedding, head and norms stay as they are. The values and
their scales are a `qwix.QArray`, which `jllama.model.linear` multiplies with.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jllama.config import ComputeConfig, ModelConfig
from jllama.model import llama
from jllama.model.param import EachLeaf, dotted
from jllama.parallel.sharding import scales_sharding

Kind = Literal["int8", "int4", "nf4"]

# Inputs that share a scale in 4 bits; QLoRA's block. int8 has one scale per output.
BLOCK = 64


def quantizer(config: ModelConfig, kind: Kind | Literal["none"], whole: Any = ()) -> EachLeaf:
    """The function (path, parameter) -> what is kept of it: its quantised form for a block's
    matrix, whose array is deleted, and the parameter itself for all else.

    Placed shapes give placed shapes.

    Args:
      whole: dotted paths of matrices that are kept because they are trained.
    """
    specs = llama.param_specs(config, ComputeConfig(dtype="float32"))
    inputs = {dotted(path): spec.inputs for path, spec in jax.tree.leaves_with_path(specs)}

    def keep(path: str, x: Any) -> Any:
        if kind == "none" or not inputs[path] or path in whole:
            return x
        program, placed = quantizing(x, inputs[path], kind)
        if isinstance(x, jax.ShapeDtypeStruct):
            return placed
        quantized = jax.block_until_ready(program(x))
        x.delete()
        return quantized

    return keep


def quantizing(x: Any, inputs: int, kind: Kind) -> tuple[Callable[[jax.Array], Any], Any]:
    """The jitted `quantize` of an array or a placed shape, and its result as placed shapes."""
    run = functools.partial(quantize, inputs=inputs, kind=kind)
    shapes = jax.eval_shape(run, x)
    places = jax.tree.map(lambda s: scales_sharding(x.sharding, s.shape, x.shape), shapes)
    placed = jax.tree.map(lambda s, p: s.update(sharding=p), shapes, places)
    return jax.jit(run, out_shardings=places), placed


def quantize(x: jax.Array, inputs: int, kind: Kind) -> Any:
    """Stacked matrices [L,inputs...,outputs...] as a `qwix.QArray`.

    Scales are absolute maxima over inputs, float32: over all inputs of an output for int8, over
    `BLOCK` neighbours within a head for 4 bits. The values are rounded to bfloat16 first, so that a
    base is quantised to the same numbers in whichever dtype it was read.
    """
    import qwix  # noqa: PLC0415  # takes half a second, which other models do not need

    *outer, last = range(inputs)

    def one(w: jax.Array) -> qwix.QArray:
        w = w.astype(jnp.bfloat16).astype(jnp.float32)
        outputs = list(range(inputs, w.ndim))
        if kind == "int8":
            return qwix.quantize(w, kind, channelwise_axes=outputs)
        tiles = {last: math.gcd(w.shape[last], BLOCK)}
        return qwix.quantize(w, kind, channelwise_axes=[*outputs, *outer], tiled_axes=tiles)

    # One layer at a time: for nf4 the work on a matrix is sixteen times the matrix.
    return jax.lax.map(one, x)
