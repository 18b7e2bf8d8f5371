"""Splash attention: interpreted on CPU against float64, and compiled ahead of time for a TPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import tpu as aot
from test_kernels import case, errors, exact

from jllama.config import MeshConfig
from jllama.model.splash import _Causal, block_size, causal_mask, splash
from jllama.parallel.context import balanced_order
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.train.loss import causal_lm_loss
from jllama.train.state import define_state
from jllama.train.step import make_train_step

LIMITS = {jnp.float32: 2e-6, jnp.bfloat16: 0.02}


@pytest.mark.parametrize(
    ("N", "dtype", "segmented"),
    [(64, jnp.float32, True), (128, jnp.bfloat16, True), (64, jnp.float32, False)],
)
def test_interpreted_values_and_gradients_equal_float64(N, dtype, segmented):
    T = 256
    *arrays, segments = case(T, H=4, K=2, N=N, B=1, dtype=dtype)
    segments = segments if segmented else None
    mask = causal_mask(T, 1, False, 128, interpret=True)

    @jax.jit
    def run(q, k, v, d_out):
        out, vjp = jax.vjp(lambda *x: splash(*x, jnp.arange(T), segments, mask), q, k, v)
        return out, *vjp(d_out)

    assert max(errors(run(*arrays), exact(*arrays, segments))) < LIMITS[dtype]


@pytest.mark.parametrize("order", [np.arange(24, dtype=np.int32), balanced_order(24, 3)], ids=len)
def test_the_mask_is_causality_in_the_order_of_the_queries(order):
    mask = _Causal(order)
    wanted = order[:, None] >= np.arange(24)
    for i in range(0, 24, 4):
        for j in range(0, 24, 8):
            at = (slice(i, i + 4), slice(j, j + 8))
            np.testing.assert_array_equal(mask[at], wanted[at])


def test_blocks_divide_the_row():
    assert block_size(4096, 512) == 512
    assert block_size(640, 512) == 128
    assert block_size(768, 512) == 384
    assert block_size(256, 512) == 256
    assert block_size(256, 1) == 128


def test_the_balanced_mask_gives_every_device_the_same_work():
    natural, balanced = (
        (causal_mask(4096, 4, b, 512).fwd_mask_info.block_mask > 0).reshape(4, -1).sum(axis=1)
        for b in (False, True)
    )
    assert len(set(balanced.tolist())) == 1
    assert max(natural) > 3 * min(natural)


@pytest.fixture(scope="module")
def tpu():
    return aot.devices("v5e:2x2")


def compiled_step(devices, *overrides, **sizes):
    config = recipes.in_memory(
        "compute.dtype=bfloat16", "data.length=512", "training.batch_size=8",
        "training.accumulate=2", *overrides, max_length=512, head_dim=64,
    )  # fmt: skip
    placement = Placement(make_mesh(MeshConfig(**sizes), devices), config.sharding)
    definition = define_state(config, placement)
    step = make_train_step(config, functools.partial(causal_lm_loss, config), definition, placement)
    shape = (config.training.batch_size, config.data.length + 1)
    batch = {"tokens": jnp.int32, "segments": jnp.int32, "weights": jnp.float32}
    rows = placement.sharding(shape, ("batch", None), "batch")
    batch = {k: jax.ShapeDtypeStruct(shape, t, sharding=rows) for k, t in batch.items()}
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        definition.shapes, definition.shardings,
    )  # fmt: skip
    return step.lower(state, (), batch).compile()


def kernels_of(step):
    calls = re.findall(r"%splash_mha_(\w+?)_\S* = .*tpu_custom_call", step.as_text())
    return sorted(calls)


@pytest.mark.parametrize(
    ("remat", "sizes", "calls"),
    [
        ("attention", {"fsdp": 2, "context": 2}, ["dkv", "dq", "fwd"]),
        # The forward kernel runs again only where its result was not kept.
        ("full", {"fsdp": 1, "tensor": 4}, ["dkv", "dq", "fwd", "fwd"]),
    ],
    ids=str,
)
def test_a_train_step_compiles_for_tpu_with_splash(tpu, remat, sizes, calls):
    assert kernels_of(compiled_step(tpu, f"compute.remat={remat}", **sizes)) == calls


def test_offloaded_block_inputs_lie_in_the_hosts_memory(tpu):
    memory = compiled_step(tpu, "compute.remat=offload", fsdp=4).memory_analysis()
    # Two layers, a row of 512 positions on each device, width 48, bfloat16.
    assert memory.host_temp_size_in_bytes == 2 * 512 * 48 * 2
