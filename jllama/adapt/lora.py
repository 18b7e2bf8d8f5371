"""LoRA as an overlay of the parameter tree (arXiv:2106.09685).

An overlay has the paths of the parameters. Where a matrix is adapted it holds the factors `a`
[L,inputs...,R] and `b` [L,R,outputs...], and for DoRA (arXiv:2402.09353) the norms `m`
[L,outputs...]; where a parameter is trained whole, its leaf. The base never changes: `attach`
makes of an overlay what replaces leaves, and the collection `lora` of the model, which goes beside
its matrices. Several overlays at once are `jllama.adapt.mixture`.

L layers, R rank.
"""

import fnmatch
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jllama import flops
from jllama.config import Adapt, ComputeConfig, LoraConfig, ModelConfig
from jllama.errors import UserError
from jllama.model import llama
from jllama.model.linear import column_norms, dense
from jllama.model.llama import ParamSpec
from jllama.model.param import dotted

Overlay = dict[str, Any]
ParamPath = tuple[str, ...]


def overlay_specs(config: ModelConfig, compute: ComputeConfig, lora: LoraConfig) -> dict[str, Any]:
    """The overlay's tree with a `ParamSpec` at each leaf, in `compute.param_dtype`.

    Raises UserError for a pattern that matches nothing, a parameter that is both a target and
    trained whole, a layer that is not there, or a rank above the matrix.
    """
    specs = llama.param_specs(config, compute)
    owners = {dotted(path[:-1]): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs)}
    targets = _matching("targets", lora.targets, [p for p, s in owners.items() if s.inputs])
    whole = _matching("full", lora.full, list(owners))
    for i, override in enumerate(lora.overrides):
        _matching(f"overrides.{i}.match", [override.match], targets)
        beyond = [n for n in override.layers or () if n >= config.num_layers]
        if beyond:
            raise UserError(
                f"adapt.overrides.{i}.layers: there is no layer {beyond[0]}; the last of"
                f" {config.num_layers} is {config.num_layers - 1}"
            )
    both = [path for path in targets if path in whole]
    if both:
        raise UserError(f"adapt: {both[0]} is in targets and in full; take it out of one")
    if not owners.keys() & {*targets, *whole}:
        raise UserError("adapt: targets and full are empty: nothing would be trained")

    tree: dict[str, Any] = {}
    for path, spec in owners.items():
        where = tuple(path.split("."))
        if path in targets:
            put(tree, where, _factors(path, spec, lora))
        elif path in whole:
            put(tree, where, at(specs, where))
    return tree


def _matching(key: str, patterns: Sequence[str], paths: list[str]) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        here = [path for path in paths if _matches(path, pattern)]
        if not here:
            names = ", ".join(path.rpartition(".")[2] for path in paths)
            raise UserError(f"adapt.{key}: {pattern!r} matches nothing; there are: {names}")
        found.update(here)
    return [path for path in paths if path in found]


def _matches(path: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (path, path.rpartition(".")[2]))


def _factors(path: str, spec: ParamSpec, lora: LoraConfig) -> dict[str, ParamSpec]:
    (L, *shape), (stack, *axes), cut = spec.shape, spec.axes, spec.inputs
    ranks = [rank for rank, _ in ranks_and_scales(path, lora, L)]
    R = max(ranks)
    if not R or (lora.dora and not min(ranks)):
        why = "with dora, whose norms are trained in all" if R else "in every layer"
        raise UserError(f"adapt.overrides: {path} has rank 0 {why}; take it out of adapt.targets")
    most = int(min(np.prod(shape[:cut]), np.prod(shape[cut:])))
    if most < R:
        raise UserError(
            f"adapt.rank={R}, or that of an override: above the {most} that {path} can have; lower"
            " it there (adapt.overrides), or train the matrix whole (adapt.full)"
        )

    def of(shape: list[int], axes: list[str], *, decay: bool, inputs: int) -> ParamSpec:
        return ParamSpec((L, *shape), spec.dtype, (stack, *axes), decay, inputs)

    tree = {
        "a": of([*shape[:cut], R], [*axes[:cut], "lora_rank"], decay=True, inputs=cut),
        "b": of([R, *shape[cut:]], ["lora_rank", *axes[cut:]], decay=True, inputs=1),
    }
    if lora.dora:
        tree["m"] = of(shape[cut:], axes[cut:], decay=False, inputs=0)
    return tree


def ranks_and_scales(path: str, lora: LoraConfig, layers: int) -> list[tuple[int, float]]:
    """(rank, scale) of a matrix in each layer; `scale` multiplies the product of its factors.

    Where a layer's rank is below the matrix's R, the rest of its factors is zero and stays so.
    """
    return [
        (rank, alpha / (rank**0.5 if lora.rslora else rank) if rank else 0.0)
        for rank, alpha in ranks_and_alphas(path, lora, layers)
    ]


def ranks_and_alphas(path: str, lora: LoraConfig, layers: int) -> list[tuple[int, float]]:
    """(rank, alpha) of a matrix in each layer."""

    def one(layer: int) -> tuple[int, float]:
        rank, alpha = lora.rank, lora.alpha
        for o in lora.overrides:
            if _matches(path, o.match) and (o.layers is None or layer in o.layers):
                rank = rank if o.rank is None else o.rank
                alpha = o.alpha or alpha
        return rank, alpha

    return [one(layer) for layer in range(layers)]


def matrices(overlay: Overlay, path: ParamPath = ()) -> Iterator[tuple[ParamPath, Overlay]]:
    """The path of each adapted matrix, and its {"a", "b", ...}."""
    for key, below in overlay.items():
        if isinstance(below, dict):
            if "a" in below:
                yield (*path, key), below
            else:
                yield from matrices(below, (*path, key))


def whole_leaves(overlay: Overlay, path: ParamPath = ()) -> Iterator[tuple[ParamPath, Any]]:
    """The path and the value of each parameter that the overlay has whole."""
    for key, below in overlay.items():
        if not isinstance(below, dict):
            yield (*path, key), below
        elif "a" not in below:
            yield from whole_leaves(below, (*path, key))


def layout(config: ModelConfig, lora: LoraConfig) -> dict[str, str]:
    """What an overlay has of each parameter, in words, by path: two are alike where all of it is.

    Ranks and alphas are of the layers in their order, once where they are the same in all.
    """
    specs = overlay_specs(config, ComputeConfig(dtype="float32"), lora)
    found = {".".join(path): "is trained whole" for path, _ in whole_leaves(specs)}
    for keys, _ in matrices(specs):
        path = ".".join(keys)
        settings = ranks_and_alphas(path, lora, config.num_layers)
        ranks, alphas = (
            ", ".join(f"{n:g}" for n in (some[:1] if len(set(some)) == 1 else some))
            for some in zip(*settings, strict=True)
        )
        more = [f", {key}" for key in ("rslora", "dora") if getattr(lora, key)]
        found[path] = f"has rank {ranks}, alpha {alphas}{''.join(more)}"
    return found


def parameter_count(config: ModelConfig, lora: LoraConfig) -> int:
    """What is trained, without padding of the vocabulary and of lower ranks."""
    specs = overlay_specs(config.unpadded, ComputeConfig(dtype="float32"), lora)
    unused = 0
    for path, f in matrices(specs):
        L, R = f["a"].shape[0], f["a"].shape[-1]
        ranks = [rank for rank, _ in ranks_and_scales(".".join(path), lora, L)]
        one = sum(math.prod(f[name].shape) for name in ("a", "b")) // (L * R)
        unused += one * (L * R - sum(ranks))
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs)) - unused


def train_flops_per_token(config: ModelConfig, adapt: Adapt, length: int) -> float:
    """`jllama.flops.train_flops_per_token` of what a recipe trains."""
    if not isinstance(adapt, LoraConfig):
        return flops.train_flops_per_token(config, length)
    config = config.unpadded
    compute = ComputeConfig(dtype="float32")
    specs, base = overlay_specs(config, compute, adapt), llama.param_specs(config, compute)
    thin = sum(math.prod(f[name].shape) for _, f in matrices(specs) for name in ("a", "b"))
    trained = {path for path, _ in whole_leaves(specs)}
    head = ("embedding" if config.tie_embeddings else "head", "weight")
    frozen = 0
    for keys, spec in jax.tree_util.tree_leaves_with_path(base):
        path = tuple(key.key for key in keys)
        if path not in trained and (spec.inputs or path == head):
            frozen += math.prod(spec.shape)
    return flops.train_flops_per_token(config, length, frozen, thin)


def init_overlay(
    config: ModelConfig,
    compute: ComputeConfig,
    lora: LoraConfig,
    base: llama.Params,
    key: jax.Array,
) -> Overlay:
    """A fresh overlay, `compute.param_dtype`, which changes nothing yet.

    `a` is uniform within 1/sqrt(inputs), as PEFT's; `b` is zero; `m` has the norms of the base's
    columns; what is trained whole begins as the base's.
    """
    specs = overlay_specs(config, compute, lora)
    overlay: Overlay = {}
    for path, spec in whole_leaves(specs):
        put(overlay, path, dense(at(base, path), spec.dtype))
    for path, spec in matrices(specs):
        a, b = spec["a"], spec["b"]
        L, R = a.shape[0], a.shape[-1]
        bound = float(np.prod(a.shape[1:-1])) ** -0.5
        drawn = jax.random.uniform(_key(key, path), a.shape, jnp.float32, -bound, bound)
        ranks = np.array([rank for rank, _ in ranks_and_scales(".".join(path), lora, L)])
        used = (np.arange(R) < ranks[:, None]).reshape(L, *(1,) * a.inputs, R)
        factors = {"a": (drawn * used).astype(a.dtype), "b": jnp.zeros(b.shape, b.dtype)}
        if lora.dora:
            kernel = at(base, path)["kernel"]
            norms = norms_of_layers(kernel, scaled(path, lora, factors), a.inputs)
            factors["m"] = norms.astype(spec["m"].dtype)
        put(overlay, path, factors)
    return overlay


def without_whole(base: llama.Params, overlay: Overlay) -> llama.Params:
    """The base without what the overlay has whole: what is used of it."""
    whole = {path for path, _ in whole_leaves(overlay)}

    def used(tree: Any, path: ParamPath = ()) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {k: used(v, (*path, k)) for k, v in tree.items() if (*path, k) not in whole}

    return used(base)


def attach(
    lora: LoraConfig, base: llama.Params, overlay: Overlay, key: jax.Array | None = None
) -> tuple[llama.Params, Overlay]:
    """What `llama.apply` takes for the base with one overlay: `params` and `lora`.

    With a `key` inputs of the overlay are dropped as `lora.dropout` says, as in training.
    """
    collection: Overlay = {}
    for path, factors in matrices(overlay):
        leaf = scaled(path, lora, factors)
        if key is not None and lora.dropout:
            L = factors["a"].shape[0]
            leaf["key"] = jax.random.split(_key(key, path), L)
            leaf["keep"] = jnp.full((L,), 1 - lora.dropout, jnp.float32)
        put(collection, path, leaf)
    return with_whole(base, overlay), collection


def scaled(path: ParamPath, lora: LoraConfig, factors: Overlay) -> Overlay:
    """The factors with `scale` [L,1,1] beside them."""
    L = factors["a"].shape[0]
    scales = [scale for _, scale in ranks_and_scales(".".join(path), lora, L)]
    return {**factors, "scale": jnp.asarray(scales, jnp.float32)[:, None, None]}


def norms_of_layers(kernel: Any, factors: Overlay, inputs: int) -> jax.Array:
    """Of all layers, one after another: [L,outputs...] float32."""
    return jax.lax.map(lambda of: column_norms(*of, inputs), (kernel, factors))


def with_whole(params: llama.Params, overlay: Overlay) -> llama.Params:
    """A tree of its own, with the overlay's whole parameters in the place of others'."""
    tree = jax.tree.map(lambda x: x, params, is_leaf=lambda x: not isinstance(x, dict))
    for path, value in whole_leaves(overlay):
        put(tree, path, value)
    return tree


def _key(key: jax.Array, path: ParamPath) -> jax.Array:
    """A matrix's own; it does not depend on what else is adapted."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(".".join(path).encode())))


def at(tree: Any, path: ParamPath) -> Any:
    """What stands at a path of nested dicts."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: ParamPath, value: Any) -> None:
    """Puts it there, making the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
