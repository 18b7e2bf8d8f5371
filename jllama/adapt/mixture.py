"""Several overlays over one base, mixed by weights that are arrays, one row for each request.

L layers, R rank, B rows, E overlays.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jllama.adapt.lora import (
    Overlay,
    matrices,
    stacked_column_norms,
    whole_leaves,
    with_scale,
)
from jllama.config import LoraConfig
from jllama.errors import UserError
from jllama.model import llama
from jllama.model.linear import gain

# The name of an adapter, or weights by name, 0 for those left out: {"poet": 0.7, "coder": 0.3}, and
# {} for the base alone. None is the one adapter that was loaded, or the base if there are several.
Mixture = str | Mapping[str, float] | None


def join_overlays(
    base: llama.Params,
    overlays: Sequence[tuple[LoraConfig, Overlay]],
    names: Sequence[str] = (),
) -> tuple[llama.Params, Overlay]:
    """The parameters, and the overlays joined to one, of which `weighted` makes the mixtures.

    The factors `a` and `b` of all overlays are concatenated along the rank. Each matrix further has
    `scale` [L,R]; `owner` [R], the index of each rank's overlay; and for DoRA `gains`
    [L,E,outputs...], which each overlay adds to the factor of x W.

    Raises UserError if one of several overlays holds a parameter whole, because that would replace
    the base's for all of them.
    """
    whole = [whole_leaves(overlay) for _, overlay in overlays]
    if len(overlays) > 1 and any(whole):
        n, path = next((n, next(iter(w))) for n, w in enumerate(whole) if w)
        raise UserError(
            f"adapter {names[n] if names else n}: holds {path} whole, which cannot be"
            " mixed for each request; load this adapter alone"
        )
    by_path: dict[str, list[tuple[int, Overlay]]] = {}
    for n, (lora, overlay) in enumerate(overlays):
        for path, factors in matrices(overlay).items():
            by_path.setdefault(path, []).append((n, with_scale(path, lora, factors)))
    params = flatten_dict(base, sep=".")
    joined = {
        path: _join_matrix(params[f"{path}.kernel"], parts, len(overlays))
        for path, parts in by_path.items()
    }
    for leaves in whole:
        params |= {path: value.astype(params[path].dtype) for path, value in leaves.items()}
    return unflatten_dict(params, sep="."), unflatten_dict(joined, sep=".")


def weighted(joined: Overlay, weights: jax.Array) -> Overlay:
    """The argument `lora` of `llama.apply` for rows with a mixture of their own each.

    Args:
      joined: from `join_overlays`.
      weights: the weight of each overlay, [B,E] float32, or [1,E] for all rows alike; an overlay
        with the weight 0 has no effect.
    """
    collection: Overlay = {}
    for path, leaf in matrices(joined).items():
        scale = leaf["scale"][:, None] * weights[:, leaf["owner"]]
        chosen = {"a": leaf["a"], "b": leaf["b"], "scale": scale}
        if "gains" in leaf:
            chosen["gain"] = 1.0 + jnp.einsum("BE,LE...->LB...", weights, leaf["gains"])
        collection[path] = chosen
    return unflatten_dict(collection, sep=".")


def _join_matrix(kernel: Any, parts: list[tuple[int, Overlay]], count: int) -> Overlay:
    """Joins the factors of one matrix; `parts` are (index of the overlay, factors with scale)."""
    owner = np.concatenate([np.full(f["a"].shape[-1], n) for n, f in parts])
    scales, bs, gains = [], [], {}
    for n, factors in parts:
        L, R = factors["a"].shape[0], factors["a"].shape[-1]
        scales.append(jnp.broadcast_to(factors["scale"][:, 0], (L, R)))
        b = factors["b"]
        if "m" in factors:
            norms = stacked_column_norms(kernel, factors, factors["a"].ndim - 2)
            columns = gain(factors["m"], norms)
            gains[n] = columns - 1.0
            b = b * columns[:, None]
        bs.append(b)
    leaf = {
        "a": jnp.concatenate([f["a"] for _, f in parts], -1),
        "b": jnp.concatenate(bs, 1),
        "scale": jnp.concatenate(scales, -1),
        "owner": jnp.asarray(owner, jnp.int32),
    }
    if gains:
        none = jnp.zeros_like(next(iter(gains.values())))
        leaf["gains"] = jnp.stack([gains.get(n, none) for n in range(count)], 1)
    return leaf


def mixture_weights(
    mixture: Mixture, names: Sequence[str], whole: Sequence[str] = ()
) -> tuple[float, ...]:
    """The weight of each of the loaded adapters `names`.

    `whole` names parameters that the only adapter holds whole; they have replaced the base's, so
    its weight must be 1. Raises UserError for an unknown name, or a weight that is not finite.
    """
    if mixture is None:
        mixture = dict.fromkeys(names, 1.0) if len(names) == 1 else {}
    try:
        by_name = {mixture: 1.0} if isinstance(mixture, str) else dict(mixture)
        by_name = {name: float(weight) for name, weight in by_name.items()}
    except (TypeError, ValueError):
        raise UserError(
            f"adapter={mixture!r}: expected the name of an adapter, or weights by name"
        ) from None
    if unknown := by_name.keys() - set(names):
        loaded = ", ".join(names) or "none"
        raise UserError(f"adapter: no {min(unknown)!r} was loaded; loaded are: {loaded}")
    weights = tuple(by_name.get(name, 0.0) for name in names)
    if not all(map(math.isfinite, weights)):
        raise UserError(f"adapter: weights {weights} are not all finite")
    if whole and weights != (1.0,):
        raise UserError(
            f"adapter {names[0]}: holds {whole[0]} whole, and so has weight 1; to go without it,"
            " load the base alone"
        )
    return weights


def adapter_weights(arguments: Sequence[str]) -> dict[str, float]:
    """The weight of each path of `--adapter PATH[=WEIGHT]`, by default 1.

    Raises UserError for a weight that is not a number, and for a path that is given twice.
    """
    weights: dict[str, float] = {}
    for argument in arguments:
        path, equals, weight = argument.rpartition("=")
        try:
            path, number = (path, float(weight)) if equals else (argument, 1.0)
        except ValueError:
            raise UserError(f"--adapter {argument}: {weight!r} is not a number") from None
        if path in weights:
            raise UserError(f"--adapter {path}: is given twice; give it once, with its weight")
        weights[path] = number
    return weights
