"""An overlay worked into its base: the parameters of a model without an adapter.

L layers, R rank.
"""

import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jllama.adapt import quant
from jllama.adapt.lora import Overlay, at, matrices, put, scaled, with_whole
from jllama.config import LoraConfig
from jllama.errors import UserError
from jllama.model import llama
from jllama.model.linear import column_norms, dense, gain


class Rounding(NamedTuple):
    """What merging did to the adapted matrices W, in Frobenius norms over all of them.

    Attributes:
      error: |rounded - exact| / |exact|.
      change: |exact - W| / |exact|, what the overlay is.
    """

    error: float
    change: float


def merge(
    lora: LoraConfig,
    base: llama.Params,
    overlay: Overlay,
    kind: str = "float32",
) -> tuple[llama.Params, Rounding]:
    """The base with the overlay worked into its matrices, and what rounding them did.

    Adapted matrices are computed in float32 and then rounded to `kind`: float32, bfloat16, float16
    or one of `quant.Kind`. The base is not changed: to unmerge is to drop the result.

    Raises UserError for a value that is not finite.
    """
    params, total = with_whole(base, overlay), np.zeros(3)
    for path, factors in matrices(overlay):
        kernel = at(base, path)["kernel"]
        exact = _merged(kernel, scaled(path, lora, factors))
        if kind in typing.get_args(quant.Kind):
            rounded = quant.quantize(exact, factors["a"].ndim - 2, kind)
        else:
            rounded = exact.astype(kind)
        squares = np.asarray(_squares(exact, rounded, kernel), np.float64)
        if not np.isfinite(squares[1:]).all():
            raise UserError(f"{'.'.join(path)}: the adapter, or its base, is not finite there")
        if not np.isfinite(squares[0]):
            raise UserError(f"{'.'.join(path)}: merged, it does not fit {kind}; use float32")
        total += squares
        put(params, (*path, "kernel"), rounded)
    error, change = np.sqrt(total[:2] / total[2]) if total[2] else (0.0, 0.0)
    return params, Rounding(float(error), float(change))


@jax.jit
def _merged(kernel: Any, factors: Overlay) -> jax.Array:
    """m / |W'| W' with W' = W + scale a b, all layers: float32; without `m`, W'."""

    def one(of: tuple[Any, Overlay]) -> jax.Array:
        kernel, f = of
        w = dense(kernel, jnp.float32) + jnp.tensordot(f["a"] * f["scale"][0], f["b"], 1)
        return w * gain(f["m"], column_norms(kernel, f, f["a"].ndim - 1)) if "m" in f else w

    return jax.lax.map(one, (kernel, factors))


@jax.jit
def _squares(exact: jax.Array, rounded: Any, before: Any) -> jax.Array:
    """[|rounded - exact|^2, |exact - before|^2, |exact|^2], Frobenius norms, float32."""
    off = dense(rounded, jnp.float32) - exact, exact - dense(before, jnp.float32), exact
    return jnp.stack([jnp.sum(jnp.square(x)) for x in off])
