"""Merges an overlay into its base: the result is a model without an adapter.

L layers, R rank.
"""

import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jllama.adapt import quant
from jllama.adapt.lora import Overlay, matrices, with_scale, with_whole
from jllama.config import LoraConfig
from jllama.errors import UserError
from jllama.model import llama
from jllama.model.linear import column_norms, dense, gain


class Rounding(NamedTuple):
    """The error of merging an overlay into its matrices W, in Frobenius norms over all of them.

    Attributes:
      error: |rounded - exact| / |exact|.
      change: |exact - W| / |exact|, the size of the overlay.
    """

    error: float
    change: float


def merge_overlay(
    lora: LoraConfig,
    base: llama.Params,
    overlay: Overlay,
    kind: str = "float32",
) -> tuple[llama.Params, Rounding]:
    """The base with the overlay merged into its matrices, and the error of rounding them.

    The adapted matrices are computed in float32 and then rounded to `kind`: float32, bfloat16,
    float16 or a `quant.Kind`. The base does not change.

    Raises UserError for a value that is not finite.
    """
    params, total = flatten_dict(with_whole(base, overlay), sep="."), np.zeros(3)
    for path, factors in matrices(overlay).items():
        kernel = params[f"{path}.kernel"]
        exact = _merged(kernel, with_scale(path, lora, factors))
        if kind in typing.get_args(quant.Kind):
            rounded = quant.quantize(exact, factors["a"].ndim - 2, kind)
        else:
            rounded = exact.astype(kind)
        squares = np.asarray(_squares(exact, rounded, kernel), np.float64)
        if not np.isfinite(squares[1:]).all():
            raise UserError(f"{path}: the adapter, or its base, holds values that are not finite")
        if not np.isfinite(squares[0]):
            raise UserError(
                f"{path}: the merged matrix has values too large for {kind}; use float32"
            )
        total += squares
        params[f"{path}.kernel"] = rounded
    error, change = np.sqrt(total[:2] / total[2]) if total[2] else (0.0, 0.0)
    return unflatten_dict(params, sep="."), Rounding(float(error), float(change))


@jax.jit
def _merged(kernel: Any, factors: Overlay) -> jax.Array:
    """W' = W + scale a b of all layers, and with DoRA's norms m, m / |W'| W': float32."""

    def merged_layer(layer: tuple[Any, Overlay]) -> jax.Array:
        kernel, f = layer
        w = dense(kernel, jnp.float32) + jnp.tensordot(f["a"] * f["scale"][0], f["b"], 1)
        return w * gain(f["m"], column_norms(kernel, f, f["a"].ndim - 1)) if "m" in f else w

    return jax.lax.map(merged_layer, (kernel, factors))


@jax.jit
def _squares(exact: jax.Array, rounded: Any, before: Any) -> jax.Array:
    """The squared norms [|rounded - exact|^2, |exact - before|^2, |exact|^2], float32."""
    terms = dense(rounded, jnp.float32) - exact, exact - dense(before, jnp.float32), exact
    return jnp.stack([jnp.sum(jnp.square(x)) for x in terms])
