"""Rows spread over devices: the layouts, the same loss as one device, and the work of each."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import tiny
import tpu

from jllama.config import BlockwiseAttention, MeshConfig, ReferenceAttention, ShardingConfig
from jllama.errors import UserError
from jllama.model import kernels, llama, splash
from jllama.model.blockwise import segment_starts, visits
from jllama.parallel import context
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.plan.program import collectives
from jllama.train import loss as losses
from jllama.train.state import define_state


def placement(**sizes):
    sizes = {"fsdp": 1} | sizes
    devices = jax.devices()[: math.prod(sizes.values())]
    return Placement(make_mesh(MeshConfig(**sizes), devices), ShardingConfig())


def test_the_balanced_order_pairs_an_early_chunk_with_a_late_one():
    assert context.balanced_order(12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert context.balanced_order(8, 1) is None
    assert context.balanced_order(10, 2) is None


def test_the_ways_of_a_row_are_those_of_the_rules():
    assert context.sequence_ways(4, 16) == 1
    with placement(context=4, fsdp=2).active():
        assert context.sequence_ways(4, 16) == 4
        assert context.sequence_ways(4, 18) == 1  # 4 does not divide: whole on every device


MESHES = [
    {"context": 8},
    {"context": 2, "tensor": 2, "fsdp": 2},
    {"context": 2, "tensor": 4},  # more tensor ways than key/value heads
    {"replica": 2, "fsdp": 2, "tensor": 2},
]


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_grads(config, placed, params, batch):
    def loss(params):
        total, weight, _ = losses.causal_lm_loss(config, params, (), batch, jax.random.key(0))
        return total / weight

    if placed is None:
        return jax.value_and_grad(loss)(params)
    with placed.active():
        return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def case():
    config = recipes.in_memory(
        "data.length=32", "training.batch_size=4", "compute.attention={kind: blockwise, block: 4}"
    )
    params, batch = tiny.params(config.model, 5.0), recipes.batch(config)
    return config, params, batch, loss_and_grads(config, None, params, batch)


def check(case, placed):
    config, params, batch, (wanted, wanted_grads) = case
    # Parameters by their logical axes, as a run has them.
    params = jax.tree.map(
        lambda x, s: jax.device_put(x, placed.sharding(s.shape, s.axes, "x")),
        params,
        llama.param_specs(config.model, config.compute),
    )
    loss, grads = loss_and_grads(config, placed, params, placed.put_batch(batch))
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
    errors = jax.tree.map(tiny.relative_error, grads, wanted_grads)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_balanced_row_over_devices_equals_one_device(case, sizes):
    check(case, placement(**sizes))


@pytest.mark.parametrize("sizes", MESHES[:2], ids=str)
def test_a_natural_row_over_devices_equals_one_device(case, sizes, monkeypatch):
    monkeypatch.setattr(losses, "balanced_order", lambda *_: None)
    check(case, placement(**sizes))


@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "natural"])
def test_splash_over_devices_equals_blocks_on_one(balanced):
    # Interpreted; three query heads to a key/value head, and one of them on each device.
    T, ways, N = 512, 2, 64
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (
        jax.random.normal(key, (1, T, heads, N))
        for key, heads in zip(keys, (6, 2, 2, 6), strict=True)
    )
    segments = np.repeat([[1, 2, 0]], [300, 150, 62], axis=1).astype(np.int32)
    order = context.balanced_order(T, ways) if balanced else np.arange(T)
    mask = splash.causal_mask(T, ways, balanced, 128, interpret=True)
    blocks = BlockwiseAttention(kind="blockwise", block=128)

    def over_devices(q, k, v):
        at = (x[:, order] for x in (q, k, v, segments))
        return context.spread(splash.splash, *at, balanced, mask)[:, np.argsort(order)]

    def on_one(q, k, v):
        return kernels.attend_row(q, k, v, segments, blocks)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function, q, k, v, d_out):
        out, vjp = jax.vjp(function, q, k, v)
        return out, *vjp(d_out)

    wanted = run(on_one, q, k, v, d_out)
    with placement(context=ways, tensor=2).active():
        got = run(over_devices, q, k, v, d_out)
    for one, want in zip(got, wanted, strict=True):
        assert tiny.relative_error(one, want) < 2e-6


@pytest.mark.parametrize("ways", [2, 8])
def test_the_balanced_layout_gives_every_device_the_same_work(ways):
    T, block = 2048, 64

    def work(order):
        """Pairs of blocks that each device visits."""
        first = jnp.zeros((1, T // ways), jnp.int32)
        bounds = (visits(jnp.asarray(own), first, block, block) for own in order.reshape(ways, -1))
        return [int((high - low).sum()) for low, high in bounds]

    balanced, natural = work(context.balanced_order(T, ways)), work(np.arange(T))
    assert sum(balanced) == sum(natural)
    assert len(set(balanced)) == 1
    assert max(natural) > ways * min(natural)


def test_a_device_skips_other_documents_of_its_row():
    segments = jnp.repeat(jnp.arange(1, 5)[None], 16, axis=1)
    first = segment_starts(segments)[:, 48:]
    low, high = visits(jnp.arange(48, 64), first, 8, 8)
    assert low.tolist() == [6, 6]
    assert high.tolist() == [7, 8]


def test_keys_of_the_whole_row_are_not_kept_for_the_backward_pass():
    # Gathered keys would be as long as the row on every device, in every layer.
    T, ways = 4096, 8
    args = [jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)] * 3
    kernel = BlockwiseAttention(kind="blockwise", block=64)
    with placement(context=ways).active():
        saved = jax.eval_shape(
            lambda *x: jax.vjp(lambda *x: kernels.attend_row(*x, None, kernel, True), *x)[1], *args
        )
    # What every device keeps is stacked over devices: q, k, v, the result, and what is small.
    assert sum(x.size for x in jax.tree.leaves(saved)) < 5 * T * 16


def test_the_backward_pass_gathers_again_outside_of_a_loop_too(no_cache):
    # With compute.scan_unroll no loop parts the forward from the backward pass: a gather that the
    # compiler sees twice it would do once, and keep its result. XLA's CPU backend may all the same.
    mesh = make_mesh(MeshConfig(context=4), tpu.devices("v5e:2x2"))
    placed = Placement(mesh, ShardingConfig())
    shape = (1, 512, 1, 128)
    where = placed.sharding(shape, ("batch", "seq", None, None), "row")
    row = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)

    def loss(q, k, v):
        out = kernels.attend_row(q, k, v, None, ReferenceAttention(kind="reference"), True)
        return jnp.square(out.astype(jnp.float32)).sum()

    with placed.active():
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(row, row, row).compile().as_text()
    gathers = [c for c in collectives(text) if c.kind == "all-gather"]
    assert sum(c.times for c in gathers) == 2 + 2  # keys and values, forward and backward


def test_rows_that_the_context_axis_would_repeat_are_an_error():
    config = recipes.in_memory("data.length=18", "mesh.context=4", "mesh.fsdp=2")
    with pytest.raises(UserError, match=r"data\.length=18 does not divide by mesh\.context=4"):
        define_state(config, Placement(make_mesh(config.mesh), config.sharding))
