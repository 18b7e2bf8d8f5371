"""LoRA as an overlay of the parameter tree (arXiv:2106.09685).

An overlay is a tree with the paths of the parameters. For an adapted matrix it holds the factors
`a` [L,inputs...,R] and `b` [L,R,outputs...], and for DoRA (arXiv:2402.09353) the norms `m`
[L,outputs...]. For a parameter that is trained whole it holds the parameter. The base never
changes: `attach` returns the parameters to use, and the collection `lora` that the model reads.
`jllama.adapt.mixture` uses several overlays at once.

L layers, R rank.
"""

import fnmatch
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jllama import flops
from jllama.config import Adapt, ComputeConfig, LoraConfig, ModelConfig
from jllama.errors import UserError
from jllama.model import llama
from jllama.model.linear import column_norms, dense
from jllama.model.llama import ParamSpec

Overlay = dict[str, Any]


def overlay_specs(config: ModelConfig, compute: ComputeConfig, lora: LoraConfig) -> dict[str, Any]:
    """The overlay's tree with a `ParamSpec` at each leaf, in `compute.param_dtype`.

    Raises UserError for a pattern that matches nothing, a parameter that is both a target and
    trained whole, a layer that the model does not have, or a rank that a matrix cannot have.
    """
    specs = flatten_dict(llama.param_specs(config, compute), sep=".")
    owners = {path.rpartition(".")[0]: spec for path, spec in specs.items()}
    targets = _matching("targets", lora.targets, [p for p, s in owners.items() if s.inputs])
    whole = _matching("full", lora.full, list(owners))
    for i, override in enumerate(lora.overrides):
        _matching(f"overrides.{i}.match", [override.match], targets)
        beyond = [n for n in override.layers or () if n >= config.num_layers]
        if beyond:
            raise UserError(
                f"adapt.overrides.{i}.layers: there is no layer {beyond[0]}; the"
                f" {config.num_layers} layers are 0 to {config.num_layers - 1}"
            )
    both = [path for path in targets if path in whole]
    if both:
        raise UserError(f"adapt: {both[0]} is in targets and in full; take it out of one")
    if not owners.keys() & {*targets, *whole}:
        raise UserError("adapt: targets and full are empty: nothing would be trained")

    factors = {path: _factors(path, owners[path], lora) for path in targets}
    kept = {path: spec for path, spec in specs.items() if path.rpartition(".")[0] in whole}
    return unflatten_dict(factors | kept, sep=".")


def _matching(key: str, patterns: Sequence[str], paths: list[str]) -> list[str]:
    """The paths that any of the patterns of `adapt.<key>` matches, in the order of `paths`."""
    matched: set[str] = set()
    for pattern in patterns:
        matches = [path for path in paths if _matches(path, pattern)]
        if not matches:
            names = ", ".join(path.rpartition(".")[2] for path in paths)
            raise UserError(f"adapt.{key}: {pattern!r} matches nothing; choose from: {names}")
        matched.update(matches)
    return [path for path in paths if path in matched]


def _matches(path: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (path, path.rpartition(".")[2]))


def _factors(path: str, spec: ParamSpec, lora: LoraConfig) -> dict[str, ParamSpec]:
    (L, *shape), (stack, *axes), cut = spec.shape, spec.axes, spec.inputs
    ranks = [rank for rank, _ in ranks_and_scales(path, lora, L)]
    R = max(ranks)
    if not R or (lora.dora and not min(ranks)):
        why = "in a layer, and dora trains the norms of all layers" if R else "in every layer"
        raise UserError(
            f"adapt.overrides: {path} has rank 0 {why}; take it out of adapt.targets and of"
            " adapt.overrides"
        )
    largest = int(min(np.prod(shape[:cut]), np.prod(shape[cut:])))
    if largest < R:
        raise UserError(
            f"adapt: {path} has rank {R}, and can have {largest} at most; lower adapt.rank, or the"
            " rank of this matrix in adapt.overrides, or train it whole (adapt.full)"
        )

    def factor(shape: list[int], axes: list[str], *, decay: bool, inputs: int) -> ParamSpec:
        return ParamSpec((L, *shape), spec.dtype, (stack, *axes), decay, inputs)

    tree = {
        "a": factor([*shape[:cut], R], [*axes[:cut], "lora_rank"], decay=True, inputs=cut),
        "b": factor([R, *shape[cut:]], ["lora_rank", *axes[cut:]], decay=True, inputs=1),
    }
    if lora.dora:
        tree["m"] = factor(shape[cut:], axes[cut:], decay=False, inputs=0)
    return tree


def ranks_and_scales(path: str, lora: LoraConfig, layers: int) -> list[tuple[int, float]]:
    """(rank, scale) of a matrix in each layer; `scale` multiplies the product of its factors.

    Where the rank of a layer is below R, the rest of its factors is zero and stays zero.
    """
    return [
        (rank, alpha / (rank**0.5 if lora.rslora else rank) if rank else 0.0)
        for rank, alpha in ranks_and_alphas(path, lora, layers)
    ]


def ranks_and_alphas(path: str, lora: LoraConfig, layers: int) -> list[tuple[int, float]]:
    """(rank, alpha) of a matrix in each layer."""

    def of_layer(layer: int) -> tuple[int, float]:
        rank, alpha = lora.rank, lora.alpha
        for o in lora.overrides:
            if _matches(path, o.match) and (o.layers is None or layer in o.layers):
                rank = rank if o.rank is None else o.rank
                alpha = o.alpha or alpha
        return rank, alpha

    return [of_layer(layer) for layer in range(layers)]


def matrices(overlay: Overlay) -> dict[str, Overlay]:
    """The factors {"a", "b", ...} of each adapted matrix, by the matrix's dotted path."""
    return {path: x for path, x in _entries(overlay).items() if isinstance(x, dict)}


def whole_leaves(overlay: Overlay) -> dict[str, Any]:
    """The parameters that the overlay holds whole, by dotted path."""
    return {path: x for path, x in _entries(overlay).items() if not isinstance(x, dict)}


def _entries(overlay: Overlay) -> dict[str, Any]:
    return flatten_dict(overlay, sep=".", is_leaf=lambda _, x: "a" in x)


def layout(config: ModelConfig, lora: LoraConfig) -> dict[str, str]:
    """Describes in words what the overlay trains of each parameter, by path.

    Two overlays with the same result have the same tree and the same scales. A list of ranks or
    alphas has one number per layer, or a single number if all layers have the same.
    """
    specs = overlay_specs(config, ComputeConfig(dtype="float32"), lora)
    words = dict.fromkeys(whole_leaves(specs), "is trained whole")
    for path in matrices(specs):
        settings = ranks_and_alphas(path, lora, config.num_layers)
        ranks, alphas = (
            ", ".join(f"{n:g}" for n in (values[:1] if len(set(values)) == 1 else values))
            for values in zip(*settings, strict=True)
        )
        flags = [f", {key}" for key in ("rslora", "dora") if getattr(lora, key)]
        words[path] = f"has rank {ranks}, alpha {alphas}{''.join(flags)}"
    return words


def trained_parameter_count(config: ModelConfig, lora: LoraConfig) -> int:
    """The number of trained parameters, without padding of the vocabulary and of lower ranks."""
    specs = overlay_specs(config.unpadded, ComputeConfig(dtype="float32"), lora)
    unused = 0
    for path, f in matrices(specs).items():
        L, R = f["a"].shape[0], f["a"].shape[-1]
        ranks = [rank for rank, _ in ranks_and_scales(path, lora, L)]
        per_rank = sum(math.prod(f[name].shape) for name in ("a", "b")) // (L * R)
        unused += per_rank * (L * R - sum(ranks))
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs)) - unused


def adapted_flops_per_token(config: ModelConfig, adapt: Adapt, length: int) -> float:
    """`jllama.flops.train_flops_per_token` of a recipe, with what its `adapt` freezes and adds."""
    if not isinstance(adapt, LoraConfig):
        return flops.train_flops_per_token(config, length)
    config = config.unpadded
    compute = ComputeConfig(dtype="float32")
    specs, base = overlay_specs(config, compute, adapt), llama.param_specs(config, compute)
    thin = sum(math.prod(f[name].shape) for f in matrices(specs).values() for name in ("a", "b"))
    trained = whole_leaves(specs)
    head = f"{'embedding' if config.tie_embeddings else 'head'}.weight"
    frozen = sum(
        math.prod(spec.shape)
        for path, spec in flatten_dict(base, sep=".").items()
        if path not in trained and (spec.inputs or path == head)
    )
    return flops.train_flops_per_token(config, length, frozen, thin)


def init_overlay(
    config: ModelConfig,
    compute: ComputeConfig,
    lora: LoraConfig,
    base: llama.Params,
    key: jax.Array,
) -> Overlay:
    """An initial overlay in `compute.param_dtype`, with which the model computes what it did.

    `a` is uniform within 1/sqrt(inputs), as in PEFT; `b` is zero; `m` holds the norms of the base's
    columns; a parameter that is trained whole begins as the base's.
    """
    specs, base = overlay_specs(config, compute, lora), flatten_dict(base, sep=".")
    overlay = {path: dense(base[path], spec.dtype) for path, spec in whole_leaves(specs).items()}
    for path, spec in matrices(specs).items():
        a, b = spec["a"], spec["b"]
        L, R = a.shape[0], a.shape[-1]
        bound = float(np.prod(a.shape[1:-1])) ** -0.5
        drawn = jax.random.uniform(_key(key, path), a.shape, jnp.float32, -bound, bound)
        ranks = np.array([rank for rank, _ in ranks_and_scales(path, lora, L)])
        used = (np.arange(R) < ranks[:, None]).reshape(L, *(1,) * a.inputs, R)
        factors = {"a": (drawn * used).astype(a.dtype), "b": jnp.zeros(b.shape, b.dtype)}
        if lora.dora:
            kernel = base[f"{path}.kernel"]
            norms = stacked_column_norms(kernel, with_scale(path, lora, factors), a.inputs)
            factors["m"] = norms.astype(spec["m"].dtype)
        overlay[path] = factors
    return unflatten_dict(overlay, sep=".")


def without_whole(base: llama.Params, overlay: Overlay) -> llama.Params:
    """The base without the parameters that the overlay holds whole, which replace them."""
    whole = whole_leaves(overlay)
    used = {path: x for path, x in flatten_dict(base, sep=".").items() if path not in whole}
    return unflatten_dict(used, sep=".")


def attach(
    lora: LoraConfig, base: llama.Params, overlay: Overlay, key: jax.Array | None = None
) -> tuple[llama.Params, Overlay]:
    """The arguments `params` and `lora` of `llama.apply` for the base with one overlay.

    With a `key`, as in training, `lora.dropout` applies to the inputs of the overlay's matrices.
    """
    collection: Overlay = {}
    for path, factors in matrices(overlay).items():
        leaf = with_scale(path, lora, factors)
        if key is not None and lora.dropout:
            L = factors["a"].shape[0]
            leaf["key"] = jax.random.split(_key(key, path), L)
            leaf["keep"] = jnp.full((L,), 1 - lora.dropout, jnp.float32)
        collection[path] = leaf
    return with_whole(base, overlay), unflatten_dict(collection, sep=".")


def with_scale(path: str, lora: LoraConfig, factors: Overlay) -> Overlay:
    """The factors of a matrix, and its `scale` [L,1,1]."""
    L = factors["a"].shape[0]
    scales = [scale for _, scale in ranks_and_scales(path, lora, L)]
    return {**factors, "scale": jnp.asarray(scales, jnp.float32)[:, None, None]}


def stacked_column_norms(kernel: Any, factors: Overlay, inputs: int) -> jax.Array:
    """`column_norms` of each layer, computed one layer after another: [L,outputs...] float32."""
    return jax.lax.map(lambda layer: column_norms(*layer, inputs), (kernel, factors))


def with_whole(params: llama.Params, overlay: Overlay) -> llama.Params:
    """A copy of the tree, in which the overlay's whole parameters replace those of `params`."""
    return unflatten_dict(flatten_dict(params, sep=".") | whole_leaves(overlay), sep=".")


def _key(key: jax.Array, path: str) -> jax.Array:
    """The random key of one matrix; it does not depend on which others are adapted."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))
