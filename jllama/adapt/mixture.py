"""Several overlays over one base at once, mixed for each request by weights that are data.

L layers, R rank, B rows, E overlays.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jllama.adapt.lora import (
    Overlay,
    ParamPath,
    at,
    matrices,
    norms_of_layers,
    put,
    scaled,
    whole_leaves,
    with_whole,
)
from jllama.config import LoraConfig
from jllama.errors import UserError
from jllama.model import llama
from jllama.model.linear import gain


def join(
    base: llama.Params,
    overlays: Sequence[tuple[LoraConfig, Overlay]],
    names: Sequence[str] = (),
) -> tuple[llama.Params, Overlay]:
    """What `llama.apply` takes for the base with any mixture of several overlays, by `weighted`.

    The ranks of all stand side by side in `a` and `b`, beside `scale` [L,R], `owner` [R], which
    overlay each is of, and for DoRA `gains` [L,E,outputs...], by how much each changes x W.

    Raises UserError for several overlays of which one has a parameter whole: it would be the base's
    for all of them.
    """
    whole = [list(whole_leaves(overlay)) for _, overlay in overlays]
    if len(overlays) > 1 and any(whole):
        n, (path, _) = next((n, w[0]) for n, w in enumerate(whole) if w)
        raise UserError(
            f"adapter {names[n] if names else n}: holds {'.'.join(path)} whole, which one request"
            " cannot have and another not; load it alone"
        )
    found: dict[ParamPath, list[tuple[int, Overlay]]] = {}
    for n, (lora, overlay) in enumerate(overlays):
        for path, factors in matrices(overlay):
            found.setdefault(path, []).append((n, scaled(path, lora, factors)))
    joined: Overlay = {}
    for path, parts in found.items():
        put(joined, path, _joined(at(base, path)["kernel"], parts, len(overlays)))
    params = with_whole(base, {})
    for _, overlay in overlays:
        for path, value in whole_leaves(overlay):
            put(params, path, value.astype(at(base, path).dtype))
    return params, joined


def weighted(joined: Overlay, weights: jax.Array) -> Overlay:
    """The collection `lora` for rows that weigh the overlays each by its own.

    Args:
      joined: from `join`.
      weights: [B,E] float32, or [1,E] for all rows alike; 0 is without that overlay.
    """
    collection: Overlay = {}
    for path, leaf in matrices(joined):
        scale = leaf["scale"][:, None] * weights[:, leaf["owner"]]
        chosen = {"a": leaf["a"], "b": leaf["b"], "scale": scale}
        if "gains" in leaf:
            chosen["gain"] = 1.0 + jnp.einsum("BE,LE...->LB...", weights, leaf["gains"])
        put(collection, path, chosen)
    return collection


def _joined(kernel: Any, parts: list[tuple[int, Overlay]], count: int) -> Overlay:
    owner = np.concatenate([np.full(f["a"].shape[-1], n) for n, f in parts])
    scales, bs, gains = [], [], {}
    for n, factors in parts:
        L, R = factors["a"].shape[0], factors["a"].shape[-1]
        scales.append(jnp.broadcast_to(factors["scale"][:, 0], (L, R)))
        b = factors["b"]
        if "m" in factors:
            here = gain(factors["m"], norms_of_layers(kernel, factors, factors["a"].ndim - 2))
            gains[n] = here - 1.0
            b = b * here[:, None]
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
