"""What the compiled step moves between devices, counted, against a count by hand."""

import collections
import functools
import math
import re

import hlo
import jax
import jax.numpy as jnp
import pytest
import recipes
import tpu

from jllama.config import MeshConfig
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.train.loss import causal_lm_loss
from jllama.train.state import define_state
from jllama.train.step import make_train_step

L = 7  # layers; no other loop runs as often
# No two arrays that are told apart have the same number of elements.
SMALL = {"D": 64, "T": 20, "H": 8, "K": 4, "N": 32, "F": 176, "V": 96}
# Tiles of a TPU.
LARGE = {"D": 1280, "T": 1792, "H": 8, "K": 4, "N": 128, "F": 1536, "V": 2304}


def compiled(devices, sizes, mesh, accumulate=1):
    """The text of the step with remat=full, of one row a device and microbatch."""
    rows = math.prod(mesh.values()) // mesh.get("tensor", 1) // mesh.get("context", 1) * accumulate
    config = recipes.in_memory(
        "compute.dtype=bfloat16", "compute.remat=full", f"compute.loss_block={sizes['T'] // 3}",
        f"data.length={sizes['T']}", f"training.batch_size={rows}",
        f"training.accumulate={accumulate}",
        num_layers=L, hidden_dim=sizes["D"], num_heads=sizes["H"], num_kv_heads=sizes["K"],
        head_dim=sizes["N"], ffn_dim=sizes["F"], vocab_size=sizes["V"], max_length=sizes["T"],
    )  # fmt: skip
    placement = Placement(make_mesh(MeshConfig(**{"fsdp": 1, **mesh}), devices), config.sharding)
    definition = define_state(config, placement)
    loss = functools.partial(causal_lm_loss, config)
    step = make_train_step(config, loss, definition, placement)
    state = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
        definition.shapes, definition.shardings,
    )  # fmt: skip
    shape = (rows, sizes["T"] + 1)
    where = placement.sharding(shape, ("batch", None), "batch")
    dtypes = {"tokens": jnp.int32, "segments": jnp.int32, "weights": jnp.float32}
    batch = {k: jax.ShapeDtypeStruct(shape, d, sharding=where) for k, d in dtypes.items()}
    return step.lower(state, (), batch).compile().as_text()


def counted(text, sizes, fsdp, tensor=1, context=1):
    """How often each kind of collective runs: in the layers, and around them.

    An array is named by its number of elements: a layer's kernel, its part over tensor or that of
    one device; the table of the vocabulary likewise; an activation of one row and what it is spread
    over; or what is small: no more than a scale of all layers, or the integers of a batch.
    """
    D, T, H, K, N, F, V = (sizes[k] for k in "DTHKNFV")
    shards = fsdp * context
    names = {}
    for n in (D * H * N, D * K * N, D * F):
        names |= {n // tensor: "kernel", n // tensor // shards: "own kernel"}
    names |= {V * D // tensor: "table", V * D // tensor // shards: "own table"}
    names |= {T * D // context: "activation", T * D // context // tensor: "activation"}
    if context > 1:
        names |= dict.fromkeys((T * K * N // tensor, T * K * N // tensor // context), "row of keys")
    layers, around = collections.Counter(), collections.Counter()
    for c in hlo.collectives(text):
        size = math.prod(c.shape)
        what = "small" if size <= L * D or c.dtype[0] in "su" else names.get(size, "other")
        if c.kind == "all-to-all" and size * shards == T * D:
            what = "activation"  # XLA's CPU backend writes one array for each device
        inside = re.search(r"layers/|Llama\)+/while", c.name)
        (layers if inside else around)[c.kind, what] += c.times
    return layers, around


def large(counter):
    return {key: n for key, n in counter.items() if key[1] != "small"}


KERNELS = {
    # q, k, v, o, gate, up, down: once forward, once backward (remat=full keeps none of it; the
    # recomputed product and the gradient share a gather).
    ("all-gather", "kernel"): (7 + 7) * L,
    # Their gradients: sums over rows, of which a device keeps its part.
    ("reduce-scatter", "own kernel"): 7 * L,
}
ACTIVATIONS = {
    # Over tensor, before q, k, v and before gate, up: forward and recomputed. Backward, the
    # gradients of what o and down gave.
    ("all-gather", "activation"): (2 + 2 + 2) * L,
    # What o and down gave: forward, and o's recomputed (nothing needs down's). Backward, the
    # gradients of what went into q, k, v, added first, and into gate, up.
    ("reduce-scatter", "activation"): (2 + 1 + 2) * L,
}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fully_sharded(accumulate):
    """fsdp=8: kernels move, activations do not."""
    text = compiled(jax.devices(), SMALL, {"fsdp": 8}, accumulate)
    layers, around = counted(text, SMALL, 8)
    assert large(layers) == {key: n * accumulate for key, n in KERNELS.items()}
    # The scales of two norms have gradients too.
    assert layers["all-reduce", "small"] == 2 * L * accumulate
    # The lookup: rows of tokens find the columns of the table, and gradients their way back.
    assert around.pop(("all-to-all", "activation")) == (1 + 1) * 8 * accumulate
    # The head: once for all blocks, and for all microbatches too, which XLA sees to.
    assert around.pop(("all-gather", "table")) == 1
    # Its gradient, a part of the width each.
    assert around.pop(("reduce-scatter", "own table")) == accumulate
    assert not large(around)


def test_tensor_parallel():
    """fsdp=4, tensor=2: positions are gathered before a product, and results summed after it."""
    text = compiled(jax.devices(), SMALL, {"fsdp": 4, "tensor": 2})
    layers, around = counted(text, SMALL, 4, tensor=2)
    assert large(layers) == KERNELS | ACTIVATIONS
    # Norms see a part of the positions: the gradient of a scale is a sum over fsdp and over tensor.
    assert layers["all-reduce", "small"] == 4 * L
    # The lookup over fsdp as above. Over tensor lie rows of the table: one device has the row.
    assert around.pop(("all-to-all", "activation")) == (1 + 1) * 4
    assert around.pop(("all-reduce", "activation")) == 1
    # Positions: the gradient of the lookup's result, and what the loss takes.
    assert around.pop(("all-gather", "activation")) == 1 + 1
    assert around.pop(("reduce-scatter", "activation")) == 1  # the gradient of what the loss took
    assert around.pop(("all-gather", "table")) == 1
    assert around.pop(("reduce-scatter", "own table")) == 1
    assert not large(around)


def test_loops_are_multiplied_in():
    """The count itself: a loop in a loop, and a loop that the text says nothing about."""

    def body(x, _):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.psum(x, "fsdp") / 2, x), None

    def run(x):
        return jax.lax.psum(jax.lax.scan(body, x, length=5)[0], "fsdp")

    placement = Placement(make_mesh(MeshConfig(fsdp=8)), recipes.in_memory().sharding)
    spec = placement.partition(("fsdp",))
    f = jax.jit(placement.per_device(run, spec, spec))
    text = f.lower(jnp.ones(8)).compile().as_text()
    assert sorted(c.times for c in hlo.collectives(text)) == [1, 15]
    unsaid = text.replace("known_trip_count", "forgotten")
    assert sorted(c.times for c in hlo.collectives(unsaid)) == [1, 15]


def test_fully_sharded_on_tpu(no_cache):
    text = compiled(tpu.devices("v5e:2x4"), LARGE, {"fsdp": 8})
    layers, around = counted(text, LARGE, 8)
    assert large(layers) == KERNELS
    gathered = {c.dtype for c in hlo.collectives(text) if c.kind == "all-gather"}
    assert gathered <= {"bf16", "s32"}  # parameters are float32: the cast comes first
    assert around.pop(("all-to-all", "activation")) == 1 + 1
    assert around.pop(("all-gather", "table")) == 1
    assert around.pop(("reduce-scatter", "own table")) == 1
    assert not large(around)


def test_tensor_parallel_on_tpu(no_cache):
    text = compiled(tpu.devices("v5e:2x4"), LARGE, {"fsdp": 4, "tensor": 2})
    layers, _ = counted(text, LARGE, 4, tensor=2)
    assert large(layers) == KERNELS | ACTIVATIONS


def test_long_rows_on_tpu(no_cache):
    """fsdp=2, context=2, tensor=2: kernels are spread over context too."""
    text = compiled(tpu.devices("v5e:2x4"), LARGE, {"fsdp": 2, "context": 2, "tensor": 2})
    layers, _ = counted(text, LARGE, 2, tensor=2, context=2)
    assert large(layers) == KERNELS | ACTIVATIONS | {
        # Every device has the keys and values of whole rows: forward, recomputed, and in the
        # backward pass of attention; their gradients are summed and go back to their positions.
        ("all-gather", "row of keys"): 2 * (1 + 1) * L,
        ("reduce-scatter", "row of keys"): 2 * L,
    }


@pytest.mark.parametrize("accumulate", [1, 4])
def test_only_own_parts_go_from_slice_to_slice_and_once(no_cache, accumulate):
    chips = tpu.devices("v5e:2x4", num_slices=2)
    text = compiled(chips, LARGE, {"replica": 2, "fsdp": 8}, accumulate)
    # Collectives stay within a slice; what leaves it is sent, a device's own part of each gradient.
    assert {c.groups for c in hlo.collectives(text)} == {"{{0,1,2,3,4,5,6,7}}"}
    sent = sum(
        math.prod(c.shape) * c.times
        for c in hlo.collectives(text, ("send",)) if c.dtype == "f32"
    )  # fmt: skip
    D, H, K, N, F, V = (LARGE[k] for k in "DHKNFV")
    own = (L * D * (2 * H * N + 2 * K * N + 3 * F) + 2 * V * D) // 8
    assert 0.99 * own < sent < 1.2 * own
