"""Analytic FLOPs and bytes against what XLA compiles and against figures worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jllama import flops
from jllama.config import BlockwiseAttention, ComputeConfig, ModelConfig, NoRopeScaling
from jllama.config import recipe as recipes
from jllama.model.attention import init_cache
from jllama.model.llama import apply, init_params, logits

MODEL = ModelConfig(
    vocab_size=2048,
    hidden_dim=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    ffn_dim=704,
    max_length=1024,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope=NoRopeScaling(kind="none"),
    tie_embeddings=False,
)


LENGTHS = pytest.mark.parametrize("length", [64, 512])


def _attention(model: ModelConfig, keys: float) -> float:
    """FLOPs per token of scores and weighted values over `keys` keys."""
    return 4 * model.num_layers * model.num_heads * model.head_dim * keys


def _masked(model: ModelConfig, length: int) -> float:
    # All scores are made, half of which causality masks.
    return _attention(model, (length - 1) / 2)


def _xla_flops(model: ModelConfig, length: int, *, train: bool) -> float:
    # XLA counts the body of a loop once: unroll the layers, and attend in a single block.
    compute = ComputeConfig(
        dtype="float32",
        scan_unroll=model.num_layers,
        attention=BlockwiseAttention(kind="blockwise", block=length),
        loss_block=1 << 20,
    )
    params = jax.eval_shape(lambda: init_params(model, compute, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def forward(params, tokens):
        positions = jnp.arange(length)[None]
        hidden, _ = apply(params, model, compute, tokens, positions)
        return (logits(params, model, hidden) ** 2).sum()

    function = jax.grad(forward) if train else forward
    return jax.jit(function).lower(params, tokens).compile().cost_analysis()["flops"] / length


@LENGTHS
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_forward_flops_are_what_xla_computes(length, tie):
    model = dataclasses.replace(MODEL, tie_embeddings=tie)
    expected = flops.forward_flops_per_token(model, length) + _masked(model, length)
    assert _xla_flops(model, length, train=False) == pytest.approx(expected, rel=0.02)


@LENGTHS
def test_training_flops_are_what_xla_computes(length):
    expected = flops.train_flops_per_token(MODEL, length) + 3 * _masked(MODEL, length)
    # Attention's scores, computed again in the backward pass, are not counted: up to 2%.
    assert _xla_flops(MODEL, length, train=True) == pytest.approx(expected, rel=0.03)


def test_training_flops_of_llama2_7b_by_hand():
    # 6 FLOPs per parameter that is multiplied, and 12 L D (T+1)/2 for attention.
    multiplied = 6_738_415_616 - 32_000 * 4096 - (2 * 32 + 1) * 4096
    expected = 6 * multiplied + 12 * 32 * 4096 * 4097 / 2
    assert flops.train_flops_per_token(recipes.load_model("llama2-7b"), 4096) == expected


def test_one_position_of_the_cache_has_the_bytes_of_one_token():
    for dtype in flops.BYTES:
        compute = ComputeConfig(dtype=dtype)
        sizes = []
        for length in (128, 256):
            cache = jax.eval_shape(lambda n=length, c=compute: init_cache(MODEL, c, 1, n))
            sizes.append(
                sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache) if x.ndim > 2)
            )
        assert (sizes[1] - sizes[0]) / 128 == flops.kv_cache_bytes_per_token(MODEL, dtype)
