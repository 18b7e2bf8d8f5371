"""The collectives of the compiled step, counted, against a count by hand."""

import collections
import functools
import itertools
import math
import operator
import re

import jax
import jax.numpy as jnp
import pytest
import recipes
import tpu

from jllama.config import MeshConfig
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.plan.program import collectives
from jllama.plan.step import abstract_batch
from jllama.train.loss import causal_lm_loss
from jllama.train.state import define_state
from jllama.train.step import make_train_step

L = 7  # layers; no other loop runs as often
# Arrays are told apart by their number of elements, so no two kinds have the same one.
SMALL = {"D": 64, "T": 20, "H": 8, "K": 4, "N": 32, "F": 176, "V": 96}
# The same for TPUs: multiples of their tiles.
TILED = {"D": 640, "T": 768, "H": 4, "K": 2, "N": 128, "F": 896, "V": 1152}


def compiled(devices, sizes, mesh, accumulate=1, *overrides, rows=1):
    """The HLO of the step with remat=full; `rows` are those of a device and microbatch."""
    rows *= math.prod(mesh.values()) // mesh.get("tensor", 1) // mesh.get("context", 1) * accumulate
    config = recipes.in_memory(
        "compute.dtype=bfloat16", "compute.remat=full", f"compute.loss_block={sizes['T'] // 3}",
        f"data.length={sizes['T']}", f"training.batch_size={rows}",
        f"training.accumulate={accumulate}", *overrides,
        num_layers=L, hidden_dim=sizes["D"], num_heads=sizes["H"], num_kv_heads=sizes["K"],
        head_dim=sizes["N"], ffn_dim=sizes["F"], vocab_size=sizes["V"], max_length=sizes["T"],
    )  # fmt: skip
    placement = Placement(make_mesh(MeshConfig(**{"fsdp": 1, **mesh}), devices), config.sharding)
    definition = define_state(config, placement)
    loss = functools.partial(causal_lm_loss, config)
    step = make_train_step(config, loss, definition, placement)
    batch = abstract_batch(config, placement, rows)
    return step.lower(definition.placed, definition.frozen, batch).compile().as_text()


def counted(text, sizes, fsdp, tensor=1, context=1, stages=(), rows=1):
    """How often each kind of collective runs in the layers, and how often outside of them.

    The number of elements tells what an array is. "kernel" and "table" are a layer's kernel and a
    table of the vocabulary, whole along fsdp; "part of a kernel" and "part of a table" are what the
    first reduce-scatters of several, over `stages` devices, have left of them. "activation" is that
    of the `rows` of a device, whole or split over tensor. "small" has no more elements than the
    scales of all layers,
    or is made of integers.
    """
    D, T, H, K, N, F, V = (sizes[k] for k in "DTHKNFV")
    shards = fsdp * context
    names = {}
    kernels = [D * H * N // tensor, D * K * N // tensor, D * F // tensor]
    for ways in itertools.accumulate(stages[:-1], operator.mul):
        names |= {n // ways: "part of a kernel" for n in kernels}
        names[V * D // tensor // ways] = "part of a table"
    names |= dict.fromkeys(kernels, "kernel") | {V * D // tensor: "table"}
    names |= dict.fromkeys((rows * T * D // context // n for n in (1, tensor)), "activation")
    if context > 1:
        names |= dict.fromkeys((T * K * N // tensor, T * K * N // tensor // context), "row of keys")
    layers, around = collections.Counter(), collections.Counter()
    for c in collectives(text):
        size = c.array.elements
        what = "small" if size <= L * D or c.array.dtype[0] in "su" else names.get(size, "other")
        if c.kind == "all-to-all" and size * shards == T * D:
            what = "activation"  # XLA's CPU backend writes one array for each device
        inside = re.search(r"layers/|Transformer\)+/while", c.scope)
        (layers if inside else around)[c.kind, what] += c.times
    return layers, around


def large(counter):
    return {key: n for key, n in counter.items() if key[1] != "small"}


KERNELS = {
    # q, k, v, o, gate, up, down: gathered once in the forward pass and once in the backward pass,
    # where the recomputed product and the gradient share a gather.
    ("all-gather", "kernel"): (7 + 7) * L,
    # Their gradients: sums over rows, of which each device keeps its shard.
    ("reduce-scatter", "kernel"): 7 * L,
}
ACTIVATIONS = {
    # Over tensor, before q, k, v and before gate, up: forward and recomputed. In the backward pass
    # the gradients of the outputs of o and down.
    ("all-gather", "activation"): (2 + 2 + 2) * L,
    # The outputs of o and down in the forward pass; o's again when recomputed (nothing needs
    # down's). In the backward pass the gradients of the input of q, k, v and of that of gate, up.
    ("reduce-scatter", "activation"): (2 + 1 + 2) * L,
}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fully_sharded_step_moves_kernels_and_no_activations(accumulate):
    """On the mesh fsdp=8."""
    text = compiled(jax.devices(), SMALL, {"fsdp": 8}, accumulate)
    layers, around = counted(text, SMALL, 8)
    assert large(layers) == {key: n * accumulate for key, n in KERNELS.items()}
    # The scales of two norms have gradients too.
    assert layers["all-reduce", "small"] == 2 * L * accumulate
    # The lookup exchanges rows of tokens for columns of the table; its gradient the reverse.
    assert around.pop(("all-to-all", "activation")) == (1 + 1) * 8 * accumulate
    # The head is gathered once for all blocks, and by XLA's doing once for all microbatches.
    assert around.pop(("all-gather", "table")) == 1
    # The gradient of the head: each device keeps a part of the width.
    assert around.pop(("reduce-scatter", "table")) == accumulate
    assert not large(around)


def test_a_tensor_parallel_step_gathers_positions_and_sums_results():
    """On the mesh fsdp=4, tensor=2."""
    text = compiled(jax.devices(), SMALL, {"fsdp": 4, "tensor": 2})
    layers, around = counted(text, SMALL, 4, tensor=2)
    assert large(layers) == KERNELS | ACTIVATIONS
    # A norm has a part of the positions: a scale's gradient is summed over fsdp and over tensor.
    assert layers["all-reduce", "small"] == 4 * L
    # The lookup over fsdp is as above. The table's rows are split over tensor: one device has the
    # row, and a sum brings it to the others.
    assert around.pop(("all-to-all", "activation")) == (1 + 1) * 4
    assert around.pop(("all-reduce", "activation")) == 1
    # Positions are gathered for the gradient of the lookup's result, and for the loss.
    assert around.pop(("all-gather", "activation")) == 1 + 1
    assert around.pop(("reduce-scatter", "activation")) == 1  # the gradient of the loss's input
    assert around.pop(("all-gather", "table")) == 1
    assert around.pop(("reduce-scatter", "table")) == 1
    assert not large(around)


def test_collectives_in_loops_are_counted_as_often_as_they_run():
    """For a loop in a loop, and for loops whose trip count the HLO does not say; one has steps of
    2, from 1 to 7.
    """

    def body(x, _):
        def inner(carry):
            return carry[0] + 2, jax.lax.psum(carry[1], "fsdp") / 2

        return jax.lax.while_loop(lambda carry: carry[0] < 7, inner, (1, x))[1], None

    def run(x):
        return jax.lax.psum(jax.lax.scan(body, x, length=5)[0], "fsdp")

    placement = Placement(make_mesh(MeshConfig(fsdp=8)), recipes.in_memory().sharding)
    spec = placement.partition(("fsdp",))
    f = jax.jit(placement.per_device(run, spec, spec))
    text = f.lower(jnp.ones(8)).compile().as_text()
    assert sorted(c.times for c in collectives(text)) == [1, 15]
    unsaid = text.replace("known_trip_count", "forgotten")
    assert sorted(c.times for c in collectives(unsaid)) == [1, 15]


@pytest.mark.parametrize(
    "topology,accumulate,stages", [("v6e:4x4", 2, (4, 4)), ("v5p:2x2x4", 1, (4, 2, 2))]
)
def test_a_fully_sharded_step_on_tpu_moves_kernels_in_bfloat16(
    no_cache, topology, accumulate, stages
):
    """Also over a square or a cube of chips, where a single reduce-scatter is an all-reduce.

    The gradients are reduce-scattered along one dimension of the torus after the other.
    """
    chips = tpu.devices(topology, chips_per_host_bounds=(2, 2, 1))
    text = compiled(chips, TILED, {"fsdp": len(chips)}, accumulate)
    layers, around = counted(text, TILED, len(chips), stages=stages)
    parts = {("reduce-scatter", "part of a kernel"): 7 * L * (len(stages) - 1)}
    assert large(layers) == {key: n * accumulate for key, n in (KERNELS | parts).items()}
    gathered = {c.array.dtype for c in collectives(text) if c.kind == "all-gather"}
    assert gathered <= {"bf16", "s32"}  # float32 parameters are cast before they are gathered
    assert around.pop(("all-to-all", "activation")) == (1 + 1) * accumulate
    assert around.pop(("all-gather", "table")) == accumulate
    assert around.pop(("reduce-scatter", "table")) == accumulate
    assert around.pop(("reduce-scatter", "part of a table")) == accumulate * (len(stages) - 1)
    assert not large(around)


def test_a_rectangle_of_v5e_keeps_its_reduce_scatters(no_cache):
    """Each over both dimensions at once."""
    text = compiled(tpu.devices("v5e:2x4"), TILED, {"fsdp": 8})
    layers, _ = counted(text, TILED, 8)
    assert large(layers) == KERNELS


def test_v4_gathers_beside_products(no_cache):
    options = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    text = compiled(tpu.devices("v4:2x2x2", **options), TILED, {"fsdp": 8})
    layers, _ = counted(text, TILED, 8)
    gathers = ("all-gather", "kernel")
    assert large(layers) == {gathers: KERNELS[gathers], ("all-reduce", "kernel"): 7 * L}
    assert all(c.asynchronous for c in collectives(text) if c.kind == "all-gather")


@pytest.mark.parametrize("accumulate,dtype,hidden", [(1, "f32", 5), (2, "bf16", 2)])
def test_products_hide_the_all_reduces_of_gradients_on_a_square_of_v5e(
    no_cache, accumulate, dtype, hidden
):
    """Their compiler runs no reduce-scatter beside products, but all-reduces of single arrays.

    Of the seven gradients of a layer it hides six with the sizes of a 7B model, fewer here.
    """
    sent = () if dtype == "f32" else ("training.gradient_dtype=bfloat16",)
    text = compiled(tpu.devices("v5e:4x4"), TILED, {"fsdp": 16}, accumulate, *sent)
    layers, around = counted(text, TILED, 16)
    gathers = {("all-gather", "kernel"): KERNELS["all-gather", "kernel"]}
    gathers = {key: n * accumulate for key, n in gathers.items()}
    assert large(layers) == gathers | {("all-reduce", "kernel"): 7 * L * accumulate}
    assert around["all-reduce", "table"] == accumulate
    summed = [
        c for c in collectives(text)
        if c.kind == "all-reduce" and c.array.elements > L * TILED["D"]
    ]  # fmt: skip
    assert {c.array.dtype for c in summed} == {dtype}
    assert sum(c.times for c in summed if c.asynchronous) >= hidden * L * accumulate


@pytest.mark.parametrize(
    "topology,stages,rows",
    [("v5e:2x4", (4,), 1), ("v5e:2x4", (4,), 2), ("v5p:2x2x4", (2, 4), 1)],
)
def test_a_tensor_parallel_step_on_tpu_moves_the_same(no_cache, topology, stages, rows):
    fsdp = math.prod(stages)
    chips = tpu.devices(topology, chips_per_host_bounds=(2, 2, 1))
    sizes = TILED | {"K": 4}  # half of a query's kernel is not a key's
    text = compiled(chips, sizes, {"fsdp": fsdp, "tensor": 2}, rows=rows)
    layers, _ = counted(text, sizes, fsdp, tensor=2, stages=stages, rows=rows)
    parts = {("reduce-scatter", "part of a kernel"): 7 * L} if len(stages) > 1 else {}
    assert large(layers) == KERNELS | ACTIVATIONS | parts


def test_a_lora_step_on_tpu_gathers_the_base_and_sums_no_gradient_of_it(no_cache):
    overrides = ("adapt={kind: lora, rank: 8, alpha: 16}", "training.init_from=unread")
    text = compiled(tpu.devices("v5e:4x4"), TILED, {"fsdp": 16}, 1, *overrides)
    layers, around = counted(text, TILED, 16)
    assert layers.pop(("all-gather", "kernel")) == KERNELS["all-gather", "kernel"]
    # A and B of seven kernels are gathered as often, and their gradients summed.
    assert layers.pop(("all-gather", "other")) == KERNELS["all-gather", "kernel"]
    assert {kind for kind, _ in layers} == {"all-reduce"}
    # Each gradient is of a matrix with a side of the rank, and no kernel has one.
    summed = [c for c in collectives(text) if c.kind == "all-reduce" and c.array.elements > 640]
    assert all(8 in c.array.shape for c in summed)
    assert sum(c.times for c in summed) == 2 * 7 * L
    # The table's lookup, and the head.
    assert around.pop(("all-to-all", "activation")) == 1
    assert around.pop(("all-gather", "table")) == 1
    assert not large(around)


def test_long_rows_on_tpu_also_move_keys_and_values(no_cache):
    """fsdp=2, context=2, tensor=2: kernels are spread over context too."""
    text = compiled(tpu.devices("v5e:2x4"), TILED, {"fsdp": 2, "context": 2, "tensor": 2})
    layers, _ = counted(text, TILED, 2, tensor=2, context=2)
    assert large(layers) == KERNELS | ACTIVATIONS | {
        # Every device gathers the keys and values of whole rows: forward, and in the backward
        # pass of attention. Their gradients are summed and scattered to their positions.
        ("all-gather", "row of keys"): 2 * (1 + 1) * L,
        ("reduce-scatter", "row of keys"): 2 * L,
    }


def test_each_device_sends_its_shard_of_a_gradient_to_the_other_slice_once(no_cache):
    """However many microbatches add up to it."""
    chips = tpu.devices("v5e:2x4", num_slices=2)
    text = compiled(chips, TILED, {"replica": 2, "fsdp": 8}, accumulate=4)
    # Collectives stay within a slice. Each device sends its shard of every gradient to the other.
    found = collectives(text)
    assert all(int(n) < 8 for c in found for n in re.findall(r"\d+", c.groups))
    sent = sum(
        c.array.elements * c.times
        for c in found if c.kind == "send" and c.array.dtype == "f32"
    )  # fmt: skip
    D, H, K, N, F, V = (TILED[k] for k in "DHKNFV")
    own = (L * D * (2 * H * N + 2 * K * N + 3 * F) + 2 * V * D) // 8
    assert 0.99 * own < sent < 1.2 * own


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_sent_in_the_dtype_of_the_recipe(no_cache, accumulate):
    """Within a slice and between two."""
    chips = tpu.devices("v5e:2x4", num_slices=2)
    mesh = {"replica": 2, "fsdp": 8}
    bfloat16 = "training.gradient_dtype=bfloat16"
    found = collectives(compiled(chips, TILED, mesh, accumulate, bfloat16))
    large = [c for c in found if c.array.elements > L * TILED["D"]]
    scattered = {c.array.dtype for c in large if c.kind == "reduce-scatter"}
    assert scattered == {"bf16"}
    between = sum(c.times * c.sent for c in large if c.kind == "send" and c.array.dtype == "bf16")
    D, H, K, N, F, V = (TILED[k] for k in "DHKNFV")
    kernels_and_head = (L * D * (2 * H * N + 2 * K * N + 3 * F) + V * D) // 8
    assert between > 0.99 * 2 * kernels_and_head
