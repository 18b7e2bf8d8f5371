"""The train step: accumulation, meshes, one compilation whatever the depth, float32 state."""

import dataclasses
import functools
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import tiny

from jllama.config import MeshConfig
from jllama.errors import UserError
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.train.loss import causal_lm_loss
from jllama.train.placement import check_batches, check_rows, make_placement
from jllama.train.state import define_state, init_state
from jllama.train.step import make_eval_step, make_train_step


def setup(config, **sizes):
    """Placement, definition and step on a mesh of `sizes`, one device by default."""
    sizes = {"fsdp": 1} | sizes
    devices = jax.devices()[: math.prod(sizes.values())]
    placement = Placement(make_mesh(MeshConfig(**sizes), devices), config.sharding)
    definition = define_state(config, placement)
    loss = functools.partial(causal_lm_loss, config)
    return placement, definition, make_train_step(config, loss, definition, placement)


def train(config, steps=3, **sizes):
    """Returns the state after some steps, and the metrics of each step."""
    placement, definition, step = setup(config, **sizes)
    state, metrics = init_state(definition, 0), []
    for t in range(steps):
        state, values = step(state, (), placement.put_batch(recipes.batch(config, t)))
        metrics.append({k: float(v) for k, v in values.items()})
    return state, metrics


@pytest.fixture(scope="module")
def one_device():
    return train(recipes.in_memory())


def check_same(got, wanted):
    (state, metrics), (wanted_state, wanted_metrics) = got, wanted
    for one, want in zip(metrics, wanted_metrics, strict=True):
        assert one == pytest.approx(want, rel=1e-5)
    errors = jax.tree.map(tiny.relative_error, state.trainable, wanted_state.trainable)
    # For a gradient near zero, Adam turns a difference in the last bit into a step of full size.
    assert max(jax.tree.leaves(errors)) < 1e-3, errors


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 8},
        {"fsdp": 2, "tensor": 4},
        {"replica": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 4, "context": 2},
    ],
    ids=str,
)
def test_eight_devices_equal_one(sizes, one_device):
    got = train(recipes.in_memory(), **sizes)
    gate = got[0].trainable["layers"]["mlp"]["gate"]["kernel"]
    assert len(gate.sharding.device_set) == 8
    part = gate.addressable_shards[0].data
    assert part.size * 8 == gate.size * sizes.get("replica", 1)
    check_same(got, one_device)


@pytest.mark.parametrize(
    "sizes,stages",
    [
        ({"fsdp": 8}, (2, 4)),
        ({"fsdp": 8}, (2, 2, 2)),
        ({"fsdp": 4, "context": 2}, (2, 2, 2)),
        ({"replica": 2, "fsdp": 4}, (2, 2)),
    ],
    ids=str,
)
def test_gradients_scattered_in_stages_equal_one_device(monkeypatch, sizes, stages, one_device):
    """As on a torus, which a CPU is not."""
    devices = math.prod(sizes.values())
    along = math.prod(stages)
    assert along in (devices, devices // sizes.get("replica", 1))

    def staged(mesh, axes):
        ways = math.prod(mesh.shape[a] for a in axes)
        return stages if ways == along else (ways,)

    monkeypatch.setattr("jllama.parallel.product.scatter_stages", staged)
    monkeypatch.setattr("jllama.train.step.scatters_in_stages", lambda options: True)
    if along == devices:
        check_same(train(recipes.in_memory(), **sizes), one_device)
    else:  # with microbatches, under a vmap over the replicas
        config = recipes.in_memory("training.accumulate=2", "training.batch_size=16")
        check_same(train(config, **sizes), train(config))


def test_gradients_sent_as_bfloat16_differ_by_their_rounding(one_device):
    config = recipes.in_memory("training.gradient_dtype=bfloat16", "training.accumulate=2")
    mesh = MeshConfig(replica=2, fsdp=2)
    placement = make_placement(dataclasses.replace(config, mesh=mesh), jax.devices()[:4])
    definition = define_state(config, placement)
    step = make_train_step(config, functools.partial(causal_lm_loss, config), definition, placement)
    batch = placement.put_batch(recipes.batch(config, 0))
    _, metrics = step(init_state(definition, 0), (), batch)
    exact = one_device[1][0]
    assert float(metrics["loss"]) == pytest.approx(exact["loss"], rel=1e-5)
    off = abs(float(metrics["grad_norm"]) / exact["grad_norm"] - 1)
    assert 1e-7 < off < 2**-8


def test_muon_on_eight_devices_equals_one():
    muon = (
        "training.optimizer={kind: muon, momentum: 0.9, beta1: 0.9, beta2: 0.95, eps: 1e-8,"
        " weight_decay: 0.1, clip_norm: 1.0}"
    )
    config = recipes.in_memory(muon)
    check_same(train(config, fsdp=4, tensor=2), train(config))


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_equals_the_large_batch(accumulate, one_device):
    config = recipes.in_memory(f"training.accumulate={accumulate}")
    weights = recipes.batch(config)["weights"].reshape(-1, accumulate, 13).sum((0, 2))
    assert weights.max() > 1.05 * weights.min()  # else a mean of means would give the same
    check_same(train(config), one_device)


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 2, "tensor": 2, "context": 2},
        {"replica": 2, "fsdp": 2, "tensor": 2},
        {"replica": 4, "fsdp": 1, "context": 2},
    ],
    ids=str,
)
def test_accumulation_on_a_mesh_equals_the_large_batch(sizes, one_device):
    check_same(train(recipes.in_memory("training.accumulate=2"), **sizes), one_device)


def test_the_gradient_is_that_of_the_weighted_mean():
    # A huge eps makes Adam's direction g / (|g| + eps) proportional to the gradient, so that one
    # step shows it.
    config = recipes.in_memory(
        "training.optimizer.eps=1e6",
        "training.optimizer.weight_decay=0",
        "training.optimizer.clip_norm=1e9",
        "training.schedule={kind: constant, peak: 1e6, warmup_steps: 0}",
        "training.accumulate=4",
    )
    placement, definition, step = setup(config)
    state = init_state(definition, 0)._replace(trainable=tiny.params(config.model, 5.0))
    batch = recipes.batch(config)

    @jax.jit
    def mean_loss(params):
        loss, weight, _ = causal_lm_loss(config, params, (), batch, jax.random.key(0))
        return loss / weight

    wanted = jax.grad(mean_loss)(state.trainable)
    before = jax.tree.map(np.asarray, state.trainable)
    loss = float(mean_loss(state.trainable))
    state, metrics = step(state, (), placement.put_batch(batch))
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-6)
    moved = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.trainable)
    errors = jax.tree.map(tiny.relative_error, moved, wanted)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


def test_a_batch_of_padding_moves_no_parameter_without_weight_decay():
    config = recipes.in_memory("training.optimizer.weight_decay=0")
    placement, definition, step = setup(config)
    state = init_state(definition, 0)
    before = jax.tree.map(np.asarray, state.trainable)
    empty = {k: np.zeros_like(v) for k, v in recipes.batch(config).items()}
    state, metrics = step(state, (), placement.put_batch(empty))
    assert (float(metrics["loss"]), float(metrics["weight"])) == (0.0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, before, state.trainable)


def test_the_step_compiles_once_and_donates_its_state():
    config = recipes.in_memory()
    placement, definition, step = setup(config, fsdp=2, tensor=2)
    state, traced = init_state(definition, 0), []
    for t in range(3):
        old = state
        state, _ = step(state, (), placement.put_batch(recipes.batch(config, t)))
        traced.append(step._cache_size())
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert traced == [1, 1, 1]
    assert int(state.step) == 3


def test_bfloat16_parameters_keep_a_float32_optimizer_state():
    config = recipes.in_memory("compute.param_dtype=bfloat16", "compute.dtype=bfloat16")
    state, metrics = train(config)
    kernels = {x.dtype for x in jax.tree.leaves(state.trainable)}
    assert jnp.dtype("bfloat16") in kernels
    moments = [x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.trainable))
    assert set(moments) == {jnp.dtype("float32")}
    exact = train(recipes.in_memory(), steps=1)[1][0]["loss"]
    assert metrics[0]["loss"] == pytest.approx(exact, rel=0.02)


def test_a_batch_that_does_not_fill_the_mesh_is_an_error():
    config = recipes.in_memory("training.batch_size=4")
    with pytest.raises(UserError, match="batch"):
        train(config, fsdp=8)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_nearest_batches_are_named_and_fill_the_mesh(accumulate):
    config = recipes.in_memory(f"training.accumulate={accumulate}", "training.batch_size=30")
    placement = setup(config, fsdp=4)[0]
    with pytest.raises(UserError, match=r"=30: must be a multiple of") as error:
        check_batches(config, placement)
    nearest = str(error.value).rpartition("nearest: ")[2].split(" or ")
    assert len(nearest) == 2
    for size in nearest:
        check_batches(recipes.replace(config, training={"batch_size": int(size)}), placement)


def test_rows_that_a_context_does_not_divide_are_given_another_length():
    config = recipes.in_memory("data.length=15")
    placement = setup(recipes.in_memory(), context=4)[0]
    with pytest.raises(UserError, match=r"choose a multiple, best of 8$"):
        check_rows(config, placement)
    check_rows(recipes.replace(config, data={"length": 16}), placement)


def test_evaluation_returns_the_sums_of_the_loss_function():
    config = recipes.in_memory("training.z_loss=0.5")
    placement, definition, _ = setup(config)
    step = make_eval_step(config, functools.partial(causal_lm_loss, config), placement)
    params, batch = init_state(definition, 0).trainable, recipes.batch(config)
    nll, weight = step(params, (), placement.put_batch(batch))
    _, wanted, more = causal_lm_loss(config, params, (), batch, jax.random.key(0))
    assert float(weight) == pytest.approx(float(wanted))
    assert float(nll) == pytest.approx(float(more["nll_sum"]), rel=1e-6)  # without the z term


def build(num_layers):
    """CPU seconds to trace and compile the step; its StableHLO; its compiled HLO."""
    config = recipes.in_memory(num_layers=num_layers)
    placement, definition, step = setup(config)
    state = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        definition.shapes,
        definition.shardings,
    )
    start = time.process_time()
    lowered = step.lower(state, (), placement.put_batch(recipes.batch(config)))
    compiled = lowered.compile()
    return time.process_time() - start, lowered.as_text(), compiled.as_text()


def test_tracing_and_compiling_take_no_longer_for_80_layers_than_for_8():
    was = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    jax.clear_caches()
    try:
        build(2)  # so that work done only once is not counted below
        shallow, deep = build(8), build(80)
        for _ in range(4):  # a shared machine is noisy: the least of several times is taken
            if deep[0] <= 1.3 * shallow[0]:
                break
            shallow = min(shallow, build(8))
            deep = min(deep, build(80))
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
    assert deep[0] <= 1.3 * shallow[0]
    # The programs have the same length: only the number of layers differs.
    sizes = [[len(re.findall(r"\n", text)) for text in texts] for _, *texts in (shallow, deep)]
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] <= 1.1 * sizes[0][1]
