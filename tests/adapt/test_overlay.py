"""Low-rank overlays beside the matrices, merged into them, and several at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny

from jllama.adapt import lora, mixture
from jllama.adapt.merge import merge_overlay
from jllama.config import LoraConfig, LoraOverride
from jllama.errors import UserError
from jllama.model import llama

MODEL = tiny.config(num_kv_heads=2)
PATH = {
    name: ("layers", group, name)
    for group, names in (("attention", "qkvo"), ("mlp", ("gate", "up", "down")))
    for name in names
}


def config(**changes) -> LoraConfig:
    return LoraConfig(**{"kind": "lora", "rank": 4, "alpha": 8.0} | changes)


def random(lora_config: LoraConfig, base, seed: int = 1, std: float = 0.05):
    """An overlay with nothing at its initial value."""
    key = jax.random.key(seed)
    fresh = lora.init_overlay(MODEL, tiny.compute(), lora_config, base, key)
    leaves, tree = jax.tree.flatten(fresh)
    noise = [
        std * jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, x in enumerate(leaves)
    ]
    moved = tree.unflatten([x + n for x, n in zip(leaves, noise, strict=True)])
    for path, factors in lora.matrices(moved).items():  # what lies beyond a layer's rank stays zero
        layers = factors["a"].shape[0]
        for layer, (rank, _) in enumerate(lora.ranks_and_scales(path, lora_config, layers)):
            factors["a"] = factors["a"].at[layer, ..., rank:].set(0)
            factors["b"] = factors["b"].at[layer, rank:].set(0)
    return moved


def logits(params, collection, tokens, cpt=None):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

    def run(params, collection):
        hidden, _ = llama.apply(
            params, MODEL, cpt or tiny.compute(), tokens, positions, lora=collection
        )
        return llama.logits(params, MODEL, hidden)

    return np.asarray(jax.jit(run)(params, collection))


def by_hand(lora_config: LoraConfig, base, overlay):
    """The merged parameters in float64, matrix by matrix and layer by layer."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), lora.with_whole(base, overlay))
    for path, factors in lora.matrices(overlay).items():
        first, second, third = path.split(".")
        node = params[first][second][third]
        a, b = (np.asarray(factors[n], np.float64) for n in "ab")
        inputs = a.ndim - 2
        for layer in range(a.shape[0]):
            rank, alpha = lora_config.rank, lora_config.alpha
            for o in lora_config.overrides:
                if third == o.match and (o.layers is None or layer in o.layers):
                    rank, alpha = o.rank or rank, o.alpha or alpha
            scale = alpha / (np.sqrt(rank) if lora_config.rslora else rank)
            w = node["kernel"][layer] + scale * np.tensordot(a[layer], b[layer], 1)
            if "m" in factors:
                norm = np.sqrt((w**2).sum(tuple(range(inputs))))
                w = w * np.asarray(factors["m"], np.float64)[layer] / norm
            node["kernel"][layer] = w
    return params


BASE = tiny.params(MODEL, 5.0)
KINDS = {
    "plain": config(),
    "one matrix": config(targets=("down",)),
    "rslora": config(rslora=True),
    "dora": config(dora=True),
    "whole": config(full=("embedding", "head", "*norm")),
    "overrides": config(
        overrides=(
            LoraOverride(match="q", rank=2),
            LoraOverride(match="down", alpha=3.0, layers=(1, 2)),
            LoraOverride(match="up", rank=6, layers=(0,)),
        )
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_beside_and_merged_both_equal_the_float64_model(kind):
    overlay = random(KINDS[kind], BASE)
    tokens = tiny.tokens(2, 40)
    wanted = reference.logits(by_hand(KINDS[kind], BASE, overlay), MODEL, tokens)
    beside = logits(*lora.attach(KINDS[kind], BASE, overlay), tokens)
    merged, error = merge_overlay(KINDS[kind], BASE, overlay)
    assert error.error == 0.0 < error.change
    assert tiny.relative_error(beside, wanted) < 1e-5
    assert tiny.relative_error(logits(merged, None, tokens), wanted) < 1e-5
    assert tiny.relative_error(tiny.logits(BASE, MODEL, tokens), wanted) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_overlay_changes_nothing(kind):
    fresh = lora.init_overlay(MODEL, tiny.compute(), KINDS[kind], BASE, jax.random.key(1))
    tokens = tiny.tokens(2, 20)
    got = logits(*lora.attach(KINDS[kind], BASE, fresh), tokens)
    assert tiny.relative_error(got, tiny.logits(BASE, MODEL, tokens)) < (
        1e-6 if kind == "dora" else 1e-30
    )
    a = fresh["layers"]["mlp"]["down"]["a"]
    assert np.abs(a).max() <= 80**-0.5 < 1.2 * np.abs(a).max()


def test_a_matrix_begins_the_same_whatever_else_is_adapted():
    def a(cfg):
        overlay = lora.init_overlay(MODEL, tiny.compute(), cfg, BASE, jax.random.key(1))
        return overlay["layers"]["mlp"]["down"]["a"]

    np.testing.assert_array_equal(a(config()), a(config(targets=("down",))))


@pytest.mark.parametrize(
    "kind,most", [("bfloat16", 3e-3), ("int8", 8e-3), ("int4", 0.12), ("nf4", 0.1)]
)
def test_merging_says_what_rounding_did(kind, most):
    cfg = config()
    overlay = random(cfg, BASE)
    exact, _ = merge_overlay(cfg, BASE, overlay)
    rounded, error = merge_overlay(cfg, BASE, overlay, kind)
    off = total = 0.0
    for path in PATH.values():
        x, y = (tree[path[0]][path[1]][path[2]]["kernel"] for tree in (exact, rounded))
        y = lora.dense(y, jnp.float32)
        off, total = off + float(jnp.sum((x - y) ** 2)), total + float(jnp.sum(x**2))
    assert error.error == pytest.approx((off / total) ** 0.5, rel=1e-4)
    assert most / 4 < error.error < most


def test_several_overlays_are_switched_and_mixed_by_weight_row_by_row():
    plain, dora = config(), config(rank=3, dora=True, targets=("q", "down", "o"))
    overlays = [(plain, random(plain, BASE)), (dora, random(dora, BASE, seed=2))]
    params, joined = mixture.join_overlays(BASE, overlays)
    tokens = np.repeat(tiny.tokens(1, 24), 3, 0)
    traced = []

    @jax.jit
    def run(weights):
        traced.append(1)
        positions = np.broadcast_to(np.arange(24), tokens.shape)
        hidden, _ = llama.apply(
            params, MODEL, tiny.compute(), tokens, positions, lora=mixture.weighted(joined, weights)
        )
        return llama.logits(params, MODEL, hidden)

    got = np.asarray(run(jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])))
    for row, wanted in enumerate(
        [tiny.logits(BASE, MODEL, tokens[:1])]
        + [logits(*lora.attach(cfg, BASE, overlay), tokens[:1]) for cfg, overlay in overlays]
    ):
        assert tiny.relative_error(got[row : row + 1], wanted) < 1e-5
    half = dataclasses.replace(plain, alpha=plain.alpha / 2)
    wanted = logits(*lora.attach(half, BASE, overlays[0][1]), tokens[:1])
    got = np.asarray(run(jnp.array([[0.5, 0.0]] * 3)))
    assert tiny.relative_error(got[:1], wanted) < 1e-5
    assert len(traced) == 1


def test_two_plain_overlays_add_up():
    cfg, other = config(), config(rank=2, alpha=3.0)
    overlays = [(cfg, random(cfg, BASE)), (other, random(other, BASE, seed=2))]
    params, joined = mixture.join_overlays(BASE, overlays)
    tokens = tiny.tokens(1, 24)
    both = by_hand(other, by_hand(cfg, BASE, overlays[0][1]), overlays[1][1])
    got = logits(params, mixture.weighted(joined, jnp.ones((1, 2))), tokens)
    assert tiny.relative_error(got, reference.logits(both, MODEL, tokens)) < 1e-5


def test_several_overlays_of_which_one_has_a_whole_parameter_are_refused():
    whole = config(full=("head",))
    overlays = [(config(), random(config(), BASE)), (whole, random(whole, BASE))]
    with pytest.raises(UserError, match=r"adapter 1: holds head\.weight whole"):
        mixture.join_overlays(BASE, overlays)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"targets": ("q", "w1")}, r"adapt\.targets: 'w1' matches nothing; .*: k, o, q, v"),
        ({"full": ("wte",)}, r"adapt\.full: 'wte' matches nothing"),
        ({"full": ("down",)}, r"layers\.mlp\.down is in targets and in full"),
        (
            {"rank": 64},
            r"layers\.attention\.\w+ has rank 64.* 32 .*adapt\.rank",
        ),
        ({"targets": ()}, "nothing would be trained"),
        ({"overrides": (LoraOverride(match="w1", rank=1),)}, r"overrides\.0\.match: 'w1' matches"),
        (
            {"overrides": (LoraOverride(match="q", rank=1, layers=(3,)),)},
            r"overrides\.0\.layers: there is no layer 3; .* 0 to 2",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(changes, said):
    with pytest.raises(UserError, match=said) as e:
        lora.overlay_specs(MODEL, tiny.compute(), config(**changes))
    assert "\n" not in str(e.value)


def test_what_is_in_targets_and_in_full_is_taken_out_of_one():
    others = tuple(name for name in config().targets if name != "down")
    for changes in ({"targets": others, "full": ("down",)}, {"full": ()}):
        assert lora.overlay_specs(MODEL, tiny.compute(), config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 32},
        {"overrides": [LoraOverride(match=name, rank=32) for name in "kv"]},
        {"targets": ("q", "o", "gate", "up", "down"), "full": ("k", "v")},
    ],
    ids=["adapt.rank", "adapt.overrides", "adapt.full"],
)
def test_the_ways_out_of_a_rank_that_a_matrix_cannot_have(changes):
    with pytest.raises(
        UserError, match=r"lower adapt\.rank, or .* in adapt\.overrides, or train it"
    ):
        lora.overlay_specs(MODEL, tiny.compute(), config(rank=40))
    changes = {key: tuple(v) if isinstance(v, list) else v for key, v in changes.items()}
    lora.overlay_specs(MODEL, tiny.compute(), config(**{"rank": 40} | changes))


@pytest.mark.parametrize("changes", [{}, {"layers": (1,)}], ids=["all layers", "one of dora's"])
def test_a_matrix_of_rank_0_is_taken_out_of_the_targets(changes):
    wanted = {"overrides": (LoraOverride(match="q", rank=0, **changes),), "dora": bool(changes)}
    with pytest.raises(UserError, match=r"take it out of adapt\.targets and of adapt\.overrides"):
        lora.overlay_specs(MODEL, tiny.compute(), config(targets=("q", "v"), **wanted))
    lora.overlay_specs(MODEL, tiny.compute(), config(targets=("v",), dora=bool(changes)))


def test_patterns_name_matrices_by_name_and_by_path():
    specs = lora.overlay_specs(
        MODEL, tiny.compute(), config(targets=("layers.attention.*", "?p"), full=("*_norm",))
    )
    assert {path.rpartition(".")[2] for path in lora.matrices(specs)} == {"q", "k", "v", "o", "up"}
    assert lora.whole_leaves(specs).keys() == {
        "layers.attention_norm.scale", "layers.ffn_norm.scale", "final_norm.scale",
    }  # fmt: skip


def test_a_column_of_zeros_stays_one_under_dora():
    cfg = config(dora=True, targets=("down",))
    base = jax.tree.map(jnp.array, BASE)
    kernel = base["layers"]["mlp"]["down"]["kernel"].at[..., 5].set(0)
    base["layers"]["mlp"]["down"]["kernel"] = kernel
    fresh = lora.init_overlay(MODEL, tiny.compute(), cfg, base, jax.random.key(1))
    tokens = tiny.tokens(1, 10)
    wanted = tiny.logits(base, MODEL, tokens)
    assert tiny.relative_error(logits(*lora.attach(cfg, base, fresh), tokens), wanted) < 1e-6
    merged, _ = merge_overlay(cfg, base, fresh)
    params, joined = mixture.join_overlays(base, [(cfg, fresh)])
    both = (merged, None), (params, mixture.weighted(joined, jnp.ones((1, 1))))
    for params, collection in both:
        assert tiny.relative_error(logits(params, collection, tokens), wanted) < 1e-6


def test_what_is_not_finite_is_said_as_such():
    cfg = config(targets=("down",))
    overlay = random(cfg, BASE)
    overlay["layers"]["mlp"]["down"]["b"] = (
        overlay["layers"]["mlp"]["down"]["b"].at[0, 0, 0].set(jnp.nan)
    )
    with pytest.raises(UserError, match=r"the adapter, or its base, .*not finite"):
        merge_overlay(cfg, BASE, overlay)


def test_what_is_too_large_for_half_precision_is_merged_in_float32():
    cfg = config(targets=("down",))
    overlay = random(cfg, BASE)
    b = overlay["layers"]["mlp"]["down"]["b"]
    overlay["layers"]["mlp"]["down"]["b"] = b.at[0, 0, 0].set(1e8)
    with pytest.raises(UserError, match="values too large for float16; use float32"):
        merge_overlay(cfg, BASE, overlay, "float16")
    assert merge_overlay(cfg, BASE, overlay, "float32")[1].error == 0
