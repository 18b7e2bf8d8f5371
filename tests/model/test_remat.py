"""What each `compute.remat` keeps for the backward pass, and what it therefore computes again.

That the gradients are the same is in test_compute.
"""

import collections
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.extend.core import jaxprs_in_params

from jllama.config import BlockwiseAttention, MeshConfig, ShardingConfig
from jllama.model import llama
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement

B, T, LAYERS = 2, 32, 2
MODEL = tiny.config(num_layers=LAYERS, num_kv_heads=2)
POLICIES = ["none", "dots", "attention", "full", "offload"]


def loss_function(remat, placement=None):
    # So many blocks that they are visited in loops, which can be counted.
    blocks = BlockwiseAttention(kind="blockwise", block=T // 8)
    compute = tiny.compute(remat=remat, attention=blocks)
    params = jax.eval_shape(functools.partial(llama.init_params, MODEL, compute), jax.random.key(0))

    def loss(params, tokens):
        with placement.active() if placement else contextlib.nullcontext():
            positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
            hidden, _ = llama.apply(
                params, MODEL, compute, tokens, positions, jnp.ones_like(tokens)
            )
            return hidden.sum()

    return loss, params, jax.ShapeDtypeStruct((B, T), jnp.int32)


def kept_per_position(remat):
    """Numbers that cross from the forward to the backward pass, per position and layer."""
    loss, *args = loss_function(remat)
    saved = jax.eval_shape(lambda *x: jax.vjp(loss, *x)[1], *args)
    layers = [x.shape for x in jax.tree.leaves(saved) if x.shape[:3] == (LAYERS, B, T)]
    return sum(map(np.prod, layers)) / (LAYERS * B * T)


def primitives(jaxpr, found=None):
    """How often each primitive is in a program, the bodies of its loops included."""
    found = collections.Counter() if found is None else found
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for inner in jaxprs_in_params(equation.params):
            primitives(inner, found)
    return found


def test_what_each_policy_keeps():
    c = MODEL
    block_input = c.hidden_dim
    attention = c.num_heads * c.head_dim + c.num_heads  # the result, and its log-sum-exp
    q, k, v = (heads * c.head_dim for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads))
    products = q + k + v + c.hidden_dim + 2 * c.ffn_dim + c.hidden_dim  # o; gate and up; down
    kept = {remat: kept_per_position(remat) for remat in POLICIES}
    assert kept["full"] == block_input
    assert kept["offload"] == block_input
    assert kept["attention"] == block_input + attention
    # The last product of a block is its output, of which no gradient asks.
    assert kept["dots"] == block_input + products - c.hidden_dim + attention
    assert kept["none"] > 2 * kept["dots"]


MESHES = [None, {"fsdp": 2, "tensor": 2, "context": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_attention_runs_again_only_where_it_was_not_kept(sizes):
    # One loop over blocks of keys is one pass of the kernel: forward, and backward.
    placement = sizes and Placement(make_mesh(MeshConfig(**sizes), jax.devices()), ShardingConfig())
    loops, products = {}, {}
    for remat in POLICIES:
        loss, *args = loss_function(remat, placement)
        found = primitives(jax.make_jaxpr(jax.grad(loss))(*args).jaxpr)
        loops[remat], products[remat] = found["while"], found["dot_general"]
    assert loops == {"none": 2, "dots": 2, "attention": 2, "full": 3, "offload": 3}
    # q, k, v, gate and up again, and o, whose product with the kept result is a block's middle.
    assert products["dots"] == products["none"]
    assert products["attention"] == products["none"] + 6
    assert products["full"] == products["attention"] + 2


def test_offloading_names_the_hosts_memory():
    # What a TPU makes of it is in test_splash.
    for remat, host in (("full", 0), ("offload", 1)):
        loss, *args = loss_function(remat)
        program = str(jax.make_jaxpr(jax.grad(loss))(*args))
        assert program.count(f"f32<host>[{B},{T},{MODEL.hidden_dim}] = device_put") == host
