"""Training a LoRA overlay: gradients, what changes and what does not, meshes, FLOPs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import recipes
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict

from jllama.adapt import lora
from jllama.config import MeshConfig
from jllama.errors import UserError
from jllama.model.linear import _dropped
from jllama.model.param import map_leaves
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.train.loss import causal_lm_loss
from jllama.train.state import base_quantizer, base_shapes, define_state, init_state
from jllama.train.step import make_eval_step, make_train_step

LORA = (
    "adapt={kind: lora, rank: 4, alpha: 8}", "training.init_from=unused",
)  # fmt: skip


class Run:
    """A recipe's definition, base, state and step, on a mesh over the first `devices` devices."""

    def __init__(self, config, devices=1, **mesh):
        self.config = config
        some = jax.devices()[:devices]
        self.placement = Placement(make_mesh(MeshConfig(**mesh), some), config.sharding)
        self.definition = define_state(config, self.placement)
        shapes = base_shapes(config, self.placement)
        params = tiny.params(config.model, 5.0)
        base = jax.tree.map(
            lambda x, s: jax.device_put(x.astype(s.dtype), s.sharding), params, shapes
        )
        base = map_leaves(base, base_quantizer(config))
        self.state = init_state(self.definition, 0, base)
        self.frozen = lora.without_whole(base, self.state.trainable)
        self.loss = functools.partial(causal_lm_loss, config)
        self.step = make_train_step(config, self.loss, self.definition, self.placement)

    def go(self, steps=3):
        losses = []
        for t in range(steps):
            batch = self.placement.put_batch(recipes.batch(self.config, t))
            self.state, metrics = self.step(self.state, self.frozen, batch)
            losses.append(float(metrics["loss"]))
        return losses

    def evaluate(self, batch):
        step = make_eval_step(self.config, self.loss, self.placement)
        return step(self.state.trainable, self.frozen, batch)[0]


def moved(overlay, std=0.05):
    leaves, tree = jax.tree.flatten(overlay)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return tree.unflatten(
        [x + std * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.mark.parametrize(
    "more", [(), ("adapt.full=[embedding,head,'*norm']",), ("adapt.dora=true",)]
)
def test_gradients_equal_those_through_merged_matrices(more):
    run = Run(recipes.in_memory(*LORA, *more))
    overlay = moved(run.state.trainable)
    batch, adapt = recipes.batch(run.config), run.config.adapt
    full = dataclasses.replace(run.config, adapt=recipes.in_memory().adapt)
    frozen = flatten_dict(run.frozen, sep=".")
    norms = {
        path: lora.stacked_column_norms(
            frozen[f"{path}.kernel"],
            lora.with_scale(path, adapt, factors),
            factors["a"].ndim - 2,
        )
        for path, factors in lora.matrices(overlay).items()
    }  # constants, as DoRA has them

    def through_merged(overlay):
        params = flatten_dict(lora.with_whole(run.frozen, overlay), sep=".")
        for path, factors in lora.matrices(overlay).items():
            w = frozen[f"{path}.kernel"]
            change = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(factors["a"], factors["b"])
            w = w + 2.0 * change
            if "m" in factors:
                gain = factors["m"] / norms[path]
                w = w * gain.reshape(gain.shape[0], *(1,) * (w.ndim - gain.ndim), *gain.shape[1:])
            params[f"{path}.kernel"] = w
        return causal_lm_loss(full, unflatten_dict(params, sep="."), (), batch, jax.random.key(0))[
            0
        ]

    wanted = jax.jit(jax.grad(through_merged))(overlay)
    got = jax.jit(jax.grad(lambda o: run.loss(o, run.frozen, batch, jax.random.key(0))[0]))(overlay)
    errors = jax.tree.map(tiny.relative_error, got, wanted)
    assert max(jax.tree.leaves(errors)) < 2e-5, errors


def test_an_overlay_learns_and_its_base_does_not_change():
    run = Run(recipes.in_memory(*LORA, "training.schedule.peak=0.03"))
    before = jax.tree.map(np.asarray, run.frozen)
    fresh = jax.tree.map(np.asarray, run.state.trainable)
    batch = run.placement.put_batch(recipes.batch(run.config))
    losses = []
    for _ in range(8):
        run.state, metrics = run.step(run.state, run.frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    jax.tree.map(np.testing.assert_array_equal, before, run.frozen)
    assert all(
        np.any(a != b)
        for a, b in zip(*map(jax.tree.leaves, (fresh, run.state.trainable)), strict=True)
    )
    assert run.step._cache_size() == 1


def test_the_state_holds_the_overlay_alone():
    run = Run(recipes.in_memory(*LORA, "adapt.full=[head]", "adapt.dora=true"))
    m = run.config.model
    D, H, K, N, F, R, L = m.hidden_dim, m.num_heads, m.num_kv_heads, m.head_dim, m.ffn_dim, 4, 2
    sizes = [(D, H * N), (D, K * N), (D, K * N), (H * N, D), (D, F), (D, F), (F, D)]
    count = L * sum(R * (i + o) + o for i, o in sizes) + m.vocab_size * D
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    assert bytes_of(run.state.trainable) == 4 * count
    assert bytes_of(run.state.opt_state) - 8 * count <= 16  # two moments, and counts of steps
    assert "head" not in run.frozen and "embedding" in run.frozen


@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "context": 2}, {"replica": 2, "tensor": 4}],
    ids=str,
)
@pytest.mark.parametrize(
    "more",
    [
        ("adapt.full=[embedding,head]",),
        ("adapt.dora=true",),
        ("adapt.quantize=nf4",),
    ],
    ids=["whole", "dora", "nf4"],
)
def test_eight_devices_equal_one(mesh, more):
    sizes = {"hidden_dim": 64, "num_kv_heads": 4, "ffn_dim": 128}
    config = recipes.in_memory(
        *LORA, *more, "training.accumulate=2" if "replica" in mesh else "mesh.fsdp=-1", **sizes
    )
    one, eight = Run(config), Run(config, 8, **{"fsdp": 1} | mesh)
    np.testing.assert_allclose(one.go(), eight.go(), rtol=2e-5)
    errors = jax.tree.map(tiny.relative_error, eight.state.trainable, one.state.trainable)
    assert max(jax.tree.leaves(errors)) < 2e-3, errors
    if mesh == {"fsdp": 8}:  # spread as any parameters are
        down = eight.state.trainable["layers"]["mlp"]["gate"]["a"]
        assert down.sharding.shard_shape(down.shape)[1] == down.shape[1] // 8


def test_dropout_does_not_depend_on_the_sharding():
    config = recipes.in_memory(
        *LORA, "adapt.dropout=0.3", hidden_dim=64, num_kv_heads=4, ffn_dim=128
    )
    np.testing.assert_allclose(Run(config).go(), Run(config, 8, fsdp=4, tensor=2).go(), rtol=2e-5)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_a_quantised_base_trains_as_its_rounded_values_do(kind):
    run = Run(recipes.in_memory(*LORA, f"adapt.quantize={kind}"))
    kernel = run.frozen["layers"]["mlp"]["gate"]["kernel"]
    assert isinstance(kernel, qwix.QArray)
    assert kernel.qvalue.dtype.name == {"nf4": "uint4"}.get(kind, kind)
    rounded = jax.tree.map(
        lambda x: qwix.dequantize(x) if isinstance(x, qwix.QArray) else x,
        run.frozen, is_leaf=lambda x: isinstance(x, qwix.QArray),
    )  # fmt: skip
    overlay, batch = moved(run.state.trainable), recipes.batch(run.config)
    grad = jax.jit(
        jax.value_and_grad(lambda o, base: run.loss(o, base, batch, jax.random.key(0))[0])
    )
    (loss, got), (wanted_loss, wanted) = grad(overlay, run.frozen), grad(overlay, rounded)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)
    assert max(jax.tree.leaves(jax.tree.map(tiny.relative_error, got, wanted))) < 1e-5
    assert run.go(1)[0] > 0


def test_learning_rate_ratio_scales_the_updates_of_b_alone():
    full = "adapt.full=[head]"
    one, four = (
        Run(recipes.in_memory(*LORA, full, *more))
        for more in ((), ("adapt.learning_rate_ratio=4",))
    )
    one.state, four.state = (
        r.state._replace(trainable=moved(r.state.trainable)) for r in (one, four)
    )
    before = jax.tree.map(np.asarray, one.state.trainable)
    one.go(1), four.go(1)
    steps = [
        jax.tree.map(lambda new, old: np.asarray(new) - old, run.state.trainable, before)
        for run in (one, four)
    ]
    once, fourfold = map(lora.matrices, steps)
    for path, factors in once.items():
        other = fourfold[path]
        np.testing.assert_allclose(other["b"], 4 * factors["b"], rtol=1e-3, atol=1e-7, err_msg=path)
        np.testing.assert_array_equal(other["a"], factors["a"])
    np.testing.assert_array_equal(steps[0]["head"]["weight"], steps[1]["head"]["weight"])


def test_a_layer_of_rank_0_has_no_overlay():
    none = "adapt.overrides=[{match: '*', layers: [0], rank: 0}]"
    run = Run(recipes.in_memory(*LORA, none, "training.schedule.peak=0.03"))
    run.go(3)
    for factors in lora.matrices(run.state.trainable).values():
        for leaf in factors.values():
            assert not np.any(leaf[0]) and np.any(leaf[1])
    config, adapt = run.config.model, run.config.adapt
    everywhere = dataclasses.replace(adapt, overrides=())
    count = lora.trained_parameter_count
    assert 2 * count(config, adapt) == count(config, everywhere)
    for more, said in (
        (("adapt.overrides=[{match: q, rank: 0}]",), r"attention\.q has rank 0 in every layer"),
        ((none, "adapt.dora=true"), r"has rank 0 in a layer.* dora"),
    ):
        with pytest.raises(UserError, match=said):
            Run(recipes.in_memory(*LORA, *more))


def test_dropout_depends_on_the_key_and_is_off_in_evaluation():
    run = Run(recipes.in_memory(*LORA, "adapt.dropout=0.5"))
    run.state = run.state._replace(trainable=moved(run.state.trainable))
    batch = run.placement.put_batch(recipes.batch(run.config))

    def loss(key, run=run):
        return float(jax.jit(lambda k: run.loss(run.state.trainable, run.frozen, batch, k)[0])(key))

    some = [loss(jax.random.key(k)) for k in (0, 1, 0)]
    assert some[0] == some[2] != some[1]
    plain = Run(recipes.in_memory(*LORA))
    plain.state = run.state
    assert float(run.evaluate(batch)) == float(plain.evaluate(batch))


def test_dropout_scales_what_it_keeps_so_that_the_mean_stays():
    run = Run(recipes.in_memory(*LORA, "adapt.dropout=0.25", "adapt.targets=[down]"))
    overlay = moved(run.state.trainable)
    _, kept = lora.attach(run.config.adapt, run.frozen, overlay, jax.random.key(0))
    leaf = jax.tree.map(lambda x: x[0], kept["layers"]["mlp"]["down"])
    x = jnp.ones((50, 40, 80))
    dropped = np.asarray(_dropped(x, leaf))
    assert set(np.unique(dropped).round(5)) == {0.0, np.float32(1 / 0.75).round(5)}
    assert dropped.mean() == pytest.approx(1.0, abs=0.01)


def flops(config) -> float:
    """The FLOPs of the gradient, as XLA counts them."""
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), config.sharding)
    definition = define_state(config, placement)
    loss = functools.partial(causal_lm_loss, config)
    rows = (config.training.batch_size, config.data.length + 1)
    batch = {
        "tokens": jax.ShapeDtypeStruct(rows, jnp.int32),
        "segments": jax.ShapeDtypeStruct(rows, jnp.int32),
        "weights": jax.ShapeDtypeStruct(rows, jnp.float32),
    }
    gradient = jax.jit(jax.grad(lambda t, f, b: loss(t, f, b, jax.random.key(0))[0]))
    compiled = gradient.lower(definition.shapes.trainable, definition.frozen, batch).compile()
    return compiled.cost_analysis()["flops"]


def test_a_gradient_takes_at_most_0_70_of_the_flops_of_full_fine_tuning():
    sizes = {
        "vocab_size": 4096, "hidden_dim": 768, "num_heads": 12, "num_kv_heads": 12,
        "head_dim": 64, "ffn_dim": 2048, "num_layers": 2, "max_length": 256,
    }  # fmt: skip
    common = (
        "compute.scan_unroll=2", "compute.loss_block=100000", "compute.attention={kind: reference}",
        "data.length=256", "training.batch_size=1",
    )  # fmt: skip
    full = flops(recipes.in_memory(*common, **sizes))
    config = recipes.in_memory(*LORA, *common, "adapt.rank=8", **sizes)
    overlay = flops(config)
    assert overlay / full < 0.70
    m = config.model
    counted = lora.adapted_flops_per_token(m, config.adapt, 256) * 256
    # XLA also counts the masked half of attention's scores, and operations other than products.
    assert overlay == pytest.approx(counted, rel=0.08)
