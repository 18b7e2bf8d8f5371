"""Attention over whole rows: every kernel against float64, and which kernel runs where."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.extend.core import jaxprs_in_params

from jllama.config import (
    AutoAttention,
    BlockwiseAttention,
    CudnnAttention,
    ReferenceAttention,
    ShardingConfig,
    SplashAttention,
    recipe,
)
from jllama.errors import UserError
from jllama.model import kernels, llama
from jllama.model.blockwise import blockwise, segment_starts, visits
from jllama.parallel import context
from jllama.parallel.sharding import Placement

REFERENCE = ReferenceAttention(kind="reference")
AUTO = AutoAttention(kind="auto")


def blocks(block):
    return BlockwiseAttention(kind="blockwise", block=block)


def case(T, H=4, K=2, N=16, B=2, dtype=np.float32, seed=0):
    """q, k, v, the gradient of the result, and segments that end in padding."""
    rng = np.random.default_rng(seed)
    # Scores up to about 10: some weights are near one, some near zero.
    q, k, v, d_out = (
        jnp.asarray(2 * rng.standard_normal((B, T, h, N)), dtype) for h in (H, K, K, H)
    )
    segments = np.sort(rng.integers(1, 5, (B, T)), axis=1)
    segments[:, T - T // 6 :] = 0
    return q, k, v, d_out, segments.astype(np.int32)


@functools.partial(jax.jit, static_argnames="config")
def value_and_grads(q, k, v, d_out, segments, config):
    out, vjp = jax.vjp(lambda *x: kernels.attend_row(*x, segments, config), q, k, v)
    return out, *vjp(d_out)


def exact(q, k, v, d_out, segments):
    """Result and gradients in plain float64 NumPy, a row and a head at a time."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    B, T, H, N = q.shape
    K = k.shape[2]
    out, d_q, d_k, d_v = (np.zeros_like(x) for x in (q, q, k, v))
    for b in range(B):
        seen = np.tril(np.ones((T, T), bool))
        if segments is not None:
            seen &= segments[b][:, None] == segments[b]
        for h in range(H):
            at = (b, slice(None), h * K // H)
            scores = np.where(seen, q[b, :, h] @ k[at].T / np.sqrt(N), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[b, :, h] = weights @ v[at]
            d_weights = d_out[b, :, h] @ v[at].T
            mean = (weights * d_weights).sum(-1, keepdims=True)
            d_scores = weights * (d_weights - mean) / np.sqrt(N)
            d_q[b, :, h] = d_scores @ k[at]
            d_k[at] += d_scores.T @ q[b, :, h]
            d_v[at] += weights.T @ d_out[b, :, h]
    return out, d_q, d_k, d_v


def errors(got, wanted):
    """The largest differences over the largest values, or over 1 where those are less."""
    pairs = zip((np.asarray(x, np.float64) for x in got), wanted, strict=True)
    return [np.abs(a - b).max() / max(1, np.abs(b).max()) for a, b in pairs]


# Length, key/value heads, kernel: a length of one, one that no block divides, one block, blocks
# longer than the row.
CASES = [
    (1, 4, REFERENCE), (37, 4, REFERENCE), (1, 4, blocks(8)), (37, 4, blocks(8)),
    (37, 1, blocks(16)), (37, 2, blocks(37)), (37, 2, blocks(512)), (40, 2, blocks(8)),
]  # fmt: skip


@pytest.mark.parametrize("segmented", [True, False], ids=["segments", "whole"])
@pytest.mark.parametrize(("T", "K", "config"), CASES, ids=str)
def test_values_and_gradients_equal_float64(T, K, config, segmented):
    *arrays, segments = case(T, K=K)
    segments = segments if segmented else None
    got, wanted = value_and_grads(*arrays, segments, config), exact(*arrays, segments)
    assert max(errors(got, wanted)) < 1e-6


@pytest.mark.parametrize("config", [REFERENCE, blocks(16)], ids=lambda c: c.kind)
def test_bfloat16_is_near(config):
    *arrays, segments = case(50, dtype=jnp.bfloat16)
    got = value_and_grads(*arrays, segments, config)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    assert 1e-4 < max(errors(got, exact(*arrays, segments))) < 0.02


def test_a_number_that_comes_back_is_another_segment():
    q, k, v, d_out, _ = case(12)
    again, other = (jnp.asarray([[1] * 4 + [2] * 4 + [last] * 4] * len(q)) for last in (1, 3))
    for config in (REFERENCE, blocks(4)):
        got, wanted = (value_and_grads(q, k, v, d_out, s, config) for s in (again, other))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_the_float64_check_sees_a_wrong_mask():
    *arrays, segments = case(37)
    wrong = exact(*arrays, np.roll(segments, 1, axis=1))
    assert min(errors(value_and_grads(*arrays, segments, blocks(8)), wrong)) > 0.01


def test_a_query_visits_no_block_of_keys_outside_its_window():
    # What is not a number would spread from any block that is read: a weight of 0 times NaN.
    T, block = 64, 8
    q, k, v, _, _ = case(T, B=1)
    segments = jnp.repeat(jnp.asarray([[1, 2, 3]]), jnp.asarray([20, 24, 20]), axis=1)
    rows, first = jnp.arange(T), segment_starts(segments)
    low, high = visits(rows, first, block, block)
    assert low.tolist() == [0, 0, 0, 2, 2, 2, 5, 5]
    assert high.tolist() == list(range(1, 9))
    for i in range(T // block):
        outside = (np.arange(T) < low[i] * block) | (np.arange(T) >= high[i] * block)
        poisoned = jnp.where(outside[:, None, None], jnp.nan, v)
        out = blockwise(q, k, poisoned, rows, first, block)
        own = slice(i * block, (i + 1) * block)
        np.testing.assert_array_equal(out[:, own], blockwise(q, k, v, rows, first, block)[:, own])


def compiled_bytes(T, config):
    arrays = [jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)] * 4
    segments = jax.ShapeDtypeStruct((1, T), jnp.int32)
    lowered = value_and_grads.lower(*arrays, segments, config)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_of_blocks_grows_with_the_length_and_not_with_its_square():
    lengths = (1024, 4096)
    short, long = (compiled_bytes(T, blocks(128)) for T in lengths)
    assert long / short < 5
    short, long = (compiled_bytes(T, REFERENCE) for T in lengths)
    assert long / short > 8


def equations(jaxpr):
    inner = (j for e in jaxpr.eqns for j in jaxprs_in_params(e.params))
    return len(jaxpr.eqns) + sum(map(equations, inner))


@pytest.mark.parametrize(("T", "block", "loops"), [(32, 8, False), (40, 8, True), (520, 512, True)])
def test_only_a_short_row_of_whole_positions_is_visited_without_loops(T, block, loops):
    q, k, v, _, _ = case(T, B=1)
    first = jnp.zeros((1, T), jnp.int32)

    def program(rows):
        return str(jax.make_jaxpr(lambda q: blockwise(q, k, v, rows, first, block))(q))

    assert ("while" in program(np.arange(T))) == loops
    assert "while" in program(jnp.arange(T)[::-1])
    assert "while" in program(np.arange(T)[::-1])


def test_the_program_does_not_grow_with_the_length():
    sizes = set()
    for T in (1024, 8192):
        arrays = [jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)] * 4
        segments = jax.ShapeDtypeStruct((1, T), jnp.int32)
        program = jax.make_jaxpr(value_and_grads, static_argnums=5)
        sizes.add(equations(program(*arrays, segments, blocks(128)).jaxpr))
    assert len(sizes) == 1


BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        (("tpu", BF16, 4096, 64, 1, True), "splash"),
        (("tpu", F32, 4096, 80, 8, False), "splash"),
        (("tpu", BF16, 4000, 64, 1, True), "blockwise"),  # no multiple of 128
        (("tpu", BF16, 512, 64, 8, True), "blockwise"),  # not on each device
        (("gpu", BF16, 4096, 64, 1, False), "cudnn"),
        (("gpu", BF16, 4096, 64, 1, True), "blockwise"),
        (("gpu", BF16, 4096, 64, 2, False), "blockwise"),
        (("gpu", F32, 4096, 64, 1, False), "blockwise"),
        (("gpu", BF16, 4096, 256, 1, False), "blockwise"),
        (("cpu", F32, 4096, 64, 1, True), "blockwise"),
    ],
)
def test_auto_takes_the_best_kernel_that_can(where, kind):
    chosen = kernels.choose_kernel(AUTO, *where)
    assert chosen.kind == kind
    assert kernels.choose_kernel(chosen, *where) == chosen


def test_a_block_that_is_not_named_fits_the_cache_of_a_cpu():
    for config in (AUTO, BlockwiseAttention(kind="blockwise")):
        sizes = [
            kernels.choose_kernel(config, platform, F32, 4000, 64, 1, True).block
            for platform in ("cpu", "gpu", "tpu")
        ]
        assert sizes == [64, 512, 512]
    named = AutoAttention(kind="auto", block=256)
    assert kernels.choose_kernel(named, "cpu", F32, 4000, 64, 1, True).block == 256


SPLASH, CUDNN = SplashAttention(kind="splash"), CudnnAttention(kind="cudnn")


@pytest.mark.parametrize(
    ("config", "where", "words"),
    [
        (SPLASH, ("cpu", F32, 4096, 64, 1, True), ["kind=splash", "TPU", "cpu", "kind=auto"]),
        (SPLASH, ("tpu", F32, 4000, 64, 2, True), ["4000", "128", "data.length", "kind=blockwise"]),
        (CUDNN, ("cpu", BF16, 4096, 64, 1, False), ["kind=cudnn", "NVIDIA", "cpu", "kind=auto"]),
        (CUDNN, ("gpu", BF16, 4096, 64, 1, True), ["segments", "data.document_mask=false"]),
        (CUDNN, ("gpu", BF16, 4096, 64, 2, False), ["mesh.context=1", "kind=blockwise"]),
        (CUDNN, ("gpu", F32, 4096, 64, 1, False), ["float32", "compute.dtype=bfloat16"]),
        (CUDNN, ("gpu", BF16, 4096, 20, 1, False), ["width 20", "kind=blockwise"]),
    ],
)
def test_a_kernel_that_cannot_do_it_says_what_to_set(config, where, words):
    with pytest.raises(UserError) as error:
        kernels.choose_kernel(config, *where)
    said = str(error.value)
    assert all(word in said for word in words), said
    assert "\n" not in said
    # What it says to set can be set and is taken; `where` is platform, dtype, rows, heads, ways.
    ways = dict.fromkeys(re.findall(r"(?:set |or )([\w.]+=\w+)", said.partition(": ")[2]))
    assert ways
    platform, dtype, length, head_dim, devices, segments = where
    for way in ways:
        tiny_recipe = recipe.configs_folder() / "train" / "tiny.yaml"
        kernel = f"compute.attention.kind={config.kind}"
        loaded = recipe.load(tiny_recipe, [kernel, "mesh.context=2", "mesh.fsdp=1", way])
        kernels.choose_kernel(
            loaded.compute.attention,
            platform,
            BF16 if way == "compute.dtype=bfloat16" else dtype,
            length,
            head_dim,
            1 if way == "mesh.context=1" else devices,
            segments and loaded.data.document_mask,
        )


def test_the_platform_is_that_of_the_mesh_and_not_of_the_process():
    devices = np.array([types.SimpleNamespace(platform="tpu")])
    assert context.platform() == "cpu"
    with Placement(types.SimpleNamespace(devices=devices), ShardingConfig()).active():
        assert context.platform() == "tpu"


def test_cudnn_is_called_once_and_lowers_for_a_gpu(monkeypatch):
    # There is no GPU here: this holds the call and its gradient, and that what the forward kernel
    # makes is found and kept under its primitive's name. It computes nothing.
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)
    monkeypatch.setattr(context, "platform", lambda: "gpu")
    model = tiny.config(num_kv_heads=2)
    calls = {}
    for remat in ("none", "dots", "attention", "full"):
        compute = tiny.compute("bfloat16", remat=remat, attention=CUDNN)
        params = jax.eval_shape(lambda c=compute: llama.init_params(model, c, jax.random.key(0)))

        def loss(params, tokens, compute=compute):
            positions = jnp.broadcast_to(jnp.arange(64), tokens.shape)
            return llama.apply(params, model, compute, tokens, positions)[0].sum()

        traced = jax.jit(jax.grad(loss)).trace(params, jax.ShapeDtypeStruct((2, 64), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        names = re.findall(r"__cudnn\$fmhaSoftmax(Backward)?", text)
        calls[remat] = (names.count(""), names.count("Backward"))
    assert calls == {"none": (1, 1), "dots": (1, 1), "attention": (1, 1), "full": (2, 1)}
