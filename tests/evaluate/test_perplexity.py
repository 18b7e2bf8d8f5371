"""Perplexity against the length: windows, scalings, and figures against the float64 reference."""

import dataclasses
import tracemalloc

import jax
import numpy as np
import pytest
import reference
import tiny
import tpu as aot

from jllama.config import (
    AdaptiveRopeScaling,
    DynamicRopeScaling,
    LinearRopeScaling,
    MeshConfig,
    NoRopeScaling,
    NtkRopeScaling,
    ShardingConfig,
    YarnRopeScaling,
)
from jllama.errors import UserError
from jllama.evaluate import perplexity as module
from jllama.evaluate.perplexity import perplexity, rope_label, windows, with_rope
from jllama.generate.llama import Llama
from jllama.model import llama
from jllama.model.rope import inverse_frequencies, turns
from jllama.parallel.context import context_placement
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement

MODEL = tiny.config(max_length=16, num_layers=2)
LINEAR = dataclasses.replace(MODEL, rope=LinearRopeScaling(kind="linear", factor=4.0))
NTK = {"kind": "ntk", "alpha": 4}


def documents(*lengths):
    """Each token tells its document and its place in it."""
    return [np.arange(n) + 1000 * i for i, n in enumerate(lengths)]


def model(config=MODEL):
    return Llama(config, tiny.params(config, 5.0), None, tiny.compute())


# --------------------------------------------------------------------------------------- windows


def test_windows_lie_within_a_document_and_share_no_target():
    found = np.stack(windows(documents(9, 5, 13, 8), 8, 3, 0))
    assert found.shape == (3, 9)
    assert found[:, 0].tolist() == [0, 2000, 2003]
    assert (np.diff(found) == 1).all()
    targets = found[:, -3:].ravel()
    assert len(set(targets)) == len(targets)


def test_joined_windows_go_on_across_documents():
    found = windows(documents(4, 5, 4), 8, 2, 0, join=True)
    flat = np.concatenate(documents(4, 5, 4))
    np.testing.assert_array_equal(found, [flat[0:9], flat[2:11], flat[4:13]])


def test_of_many_windows_some_are_taken_evenly_and_reading_stops(monkeypatch):
    monkeypatch.setattr(module, "SPREAD", 16)
    read = []

    def several():
        for document in documents(*[30] * 50):
            read.append(1)
            yield document

    found = windows(several(), 9, 10, 4)
    assert [row[-1] for row in found] == [9, 5019, 11009, 16019]
    assert len(read) == 22  # 3 windows each, until 16 times as many as wanted


@pytest.mark.parametrize("join", [False, True])
def test_windows_that_overlap_take_no_memory_of_their_own(join):
    document = np.zeros(40_000, np.int32)
    tracemalloc.start()
    found = windows([document], 20_000, 4, 0, join)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 5000
    assert size < 20 * document.nbytes  # a copy of each would be 2,500 times as much


def test_too_short_a_text_is_said_with_the_remedy():
    with pytest.raises(UserError, match=r"length 9 needs .* 10 tokens, .*longest .* 7: --join"):
        windows(documents(7, 3), 9, 1, 0)
    assert len(windows(documents(7, 3), 9, 1, 0, join=True)) == 1
    with pytest.raises(UserError, match=r"length 12 needs .* 13 tokens, and all .* have 10"):
        windows(documents(7, 3), 12, 1, 0)  # which --join would not mend
    with pytest.raises(UserError, match=r"length 12 needs .* 13 tokens, and all .* have 10"):
        windows(documents(7, 3), 12, 1, 0, join=True)


# -------------------------------------------------------------------------------------- perplexity


@pytest.mark.parametrize(
    "rope", ["model", "none", "linear", {"kind": "linear", "factor": 2}, NTK, "dynamic", "adaptive"]
)
@pytest.mark.parametrize("config", [MODEL, LINEAR], ids=["plain", "interpolated"])
def test_it_is_that_of_the_float64_reference(rope, config, monkeypatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", 64)  # batches of 2, the last one not full
    some, own = tiny.tokens(3, 41), model(config)
    for length in (12, 32):
        rows = some[:, -length - 1 :]
        config = with_rope(own.config, rope, length)
        logits = reference.logits(own.params, config, rows[:, :-1])[:, -5:]
        top = logits.max(-1)
        log_z = np.log(np.exp(logits - top[..., None]).sum(-1)) + top
        nll = log_z - np.take_along_axis(logits, rows[:, -5:, None], -1)[..., 0]
        read = []
        got = perplexity(own, some, length, 5, rope, read.append)
        assert got == pytest.approx(np.exp(nll.mean()), rel=1e-5)
        assert sum(read) == 3 * length


def test_yarn_is_that_of_the_reference_and_no_other():
    some, own = tiny.tokens(2, 41), model()
    config = with_rope(own.config, "yarn", 40)
    assert config.rope == YarnRopeScaling(kind="yarn", factor=2.5, original_length=16)
    logits = reference.logits(own.params, config, some[:, :-1])[:, -4:]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = np.exp(-np.take_along_axis(log_p, some[:, -4:, None], -1).mean())
    assert perplexity(own, some, 40, 4, "yarn") == pytest.approx(wanted, rel=1e-5)
    values = {perplexity(own, some, 40, 4, rope) for rope in ("none", "linear", NTK, "yarn")}
    assert len(values) == 4


def test_one_program_serves_all_scalings_of_a_length():
    own, some = model(), tiny.tokens(2, 30)
    module._nll.clear_cache()
    for rope in ("none", "linear", NTK, "dynamic", "adaptive", "yarn"):
        perplexity(own, some, 29, 3, rope)
    longer = dataclasses.replace(own.config, max_length=64, rope_theta=1e6)
    perplexity(dataclasses.replace(own, config=longer), some, 29, 3)
    assert module._nll._cache_size() == 1


def test_memory_is_linear_in_the_length():
    own = model()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), own.params)
    angles = turns(own.config)

    def temporary(length):
        rows = jax.ShapeDtypeStruct((1, length + 1), np.int32)
        weights = jax.ShapeDtypeStruct((1,), np.float32)
        args = (shapes, own.config, own.compute, rows, weights, angles, None, 64, None)
        return module._nll.lower(*args).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(8192), temporary(32768)
    assert long < 4.2 * short
    # One score of every pair would take more.
    assert long < 32768**2 * 4 / 16


def spread(config, devices, params=None):
    """Placed parameters as `jllama.load` places them; shapes, unless values are given."""
    placement = Placement(make_mesh(MeshConfig(), devices), ShardingConfig())
    placed = llama.placed_shapes(config, placement, "float32", "float32")
    if params is None:
        return placed
    return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params, placed)


@pytest.mark.parametrize("length", [64, 60])  # 60 positions do not divide over 8 devices
def test_several_devices_share_the_positions_of_a_row(length):
    own, some = model(), tiny.tokens(2, length + 1)
    eight = dataclasses.replace(own, params=spread(MODEL, jax.devices(), own.params))
    wanted = perplexity(own, some, length, 5)
    assert perplexity(eight, some, length, 5) == pytest.approx(wanted, rel=1e-5)
    tokens = some[:, :-1]
    assert tiny.relative_error(eight.logits(tokens), own.logits(tokens)) < 1e-5
    parts = {shard.data.shape[1] for shard in eight.logits(tokens).addressable_shards}
    assert parts == ({8} if length == 64 else {60})


def test_it_compiles_for_several_tpu_chips_with_their_own_kernel(no_cache):
    config = tiny.config(hidden_dim=128, num_layers=1, max_length=16)
    params = spread(config, aot.devices("v5e:2x4"))
    rows, weights = (
        jax.ShapeDtypeStruct((1, 1025), np.int32),
        jax.ShapeDtypeStruct((1,), np.float32),
    )
    args = (params, config, tiny.compute(), rows, weights, turns(config), None, 64)
    program = module._nll.lower(*args, context_placement(params)).compile().as_text()
    assert "splash" in program


@pytest.mark.parametrize(("length", "stride"), [(30, 3), (10, 11), (10, 0)])
def test_what_the_windows_do_not_hold(length, stride):
    with pytest.raises(UserError, match=f"length={length}, stride={stride}: "):
        perplexity(model(), tiny.tokens(1, 30), length, stride)


# ---------------------------------------------------------------------------------------- scalings


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ("model", MODEL.rope),
        ("none", NoRopeScaling(kind="none")),
        ("linear", LinearRopeScaling(kind="linear", factor=3.0)),
        ({"kind": "linear", "factor": 4}, LinearRopeScaling(kind="linear", factor=4.0)),
        (NTK, NtkRopeScaling(kind="ntk", alpha=4.0)),
        ("dynamic", DynamicRopeScaling(kind="dynamic", factor=2.0, original_length=16)),
        (
            {"kind": "dynamic", "factor": 1},
            DynamicRopeScaling(kind="dynamic", factor=1.0, original_length=16),
        ),
        ("adaptive", AdaptiveRopeScaling(kind="adaptive", original_length=16)),
        (
            {"kind": "adaptive", "coefficient": 1.1},
            AdaptiveRopeScaling(kind="adaptive", original_length=16, coefficient=1.1),
        ),
        ("yarn", YarnRopeScaling(kind="yarn", factor=3.0, original_length=16)),
        (
            {"kind": "yarn", "factor": 8},
            YarnRopeScaling(kind="yarn", factor=8.0, original_length=16),
        ),
    ],
)
def test_keys_that_are_left_out_are_filled_in(rope, wanted):
    assert with_rope(MODEL, rope, 48).rope == wanted


def test_a_length_within_the_trained_one_needs_no_factor():
    assert with_rope(MODEL, "linear", 8).rope.factor == with_rope(MODEL, "yarn", 8).rope.factor == 1


def test_ntk_and_adaptive_come_on_top_of_position_interpolation():
    plain = inverse_frequencies(with_rope(MODEL, NTK, 48))
    np.testing.assert_allclose(inverse_frequencies(with_rope(LINEAR, NTK, 48)), plain / 4)
    plain = inverse_frequencies(with_rope(MODEL, "adaptive", 48), 48)
    np.testing.assert_allclose(
        inverse_frequencies(with_rope(LINEAR, "adaptive", 48), 48), plain / 4
    )
    assert with_rope(LINEAR, "none", 48).rope == MODEL.rope
    # As it does where the interpolation is inside Chinese-LLaMA's rule.
    adaptive = dataclasses.replace(MODEL, rope=tiny.ADAPTIVE2)
    for rope in (NTK, "adaptive"):
        own, other = (with_rope(m, rope, 48) for m in (adaptive, LINEAR))
        np.testing.assert_allclose(inverse_frequencies(own, 48), inverse_frequencies(other, 48))


DYNAMIC = DynamicRopeScaling(kind="dynamic", factor=2.0, original_length=16)
YARN = YarnRopeScaling(kind="yarn", factor=4.0, original_length=16)
LLAMA3 = dataclasses.replace(tiny.LLAMA3, factor=4.0, original_length=16)


@pytest.mark.parametrize("own", [LINEAR.rope, DYNAMIC, YARN, LLAMA3, tiny.ADAPTIVE2])
@pytest.mark.parametrize(("length", "reach"), [(16, 1.0), (64, 4.0), (256, 16.0)])
def test_scalings_begin_at_the_length_before_the_models_own(own, length, reach):
    """All were trained at 16 (adaptive at 4 and interpolated to 16) and reach 64."""
    before = 4 if own == tiny.ADAPTIVE2 else 16
    config = dataclasses.replace(MODEL, rope=own, max_length=64)
    # What was fine-tuned with a factor is never read with a smaller one.
    reach = max(reach * 16 / before, 1.0 if own == DYNAMIC else own.factor)
    assert with_rope(config, "linear", length).rope == LinearRopeScaling(
        kind="linear", factor=reach
    )
    yarn = YarnRopeScaling(kind="yarn", factor=reach, original_length=before)
    assert with_rope(config, "yarn", length).rope == yarn
    assert with_rope(config, "dynamic", length).rope.original_length == before
    if own == LINEAR.rope and length <= 64:
        assert with_rope(config, "linear", length).rope == own
    assert with_rope(config, {"kind": "yarn", "factor": 2}, length).rope.factor == 2


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ("yarnn", r"^rope yarnn: rope: kind 'yarnn' is unknown; allowed: .*'yarn'"),
        ("", "rope: kind '' is unknown"),
        ("ntk", r"rope ntk: rope\.alpha: is required and missing"),
        ({"factor": 2}, "rope: needs a kind"),
        ({"kind": "none", "factor": 2}, r"rope none factor=2: rope\.factor: unknown key"),
        (
            {"kind": "linear", "factor": 0.5},
            r"rope\.factor: .* greater than or equal to 1, not 0\.5",
        ),
        ({"kind": "yarn", "factor": ""}, r"rope\.factor: .* valid number"),
        ({"kind": "yarn", "original_length": -1}, r"rope\.original_length: .* not -1"),
        ({"kind": "ntk", "alpha": float("nan")}, r"rope\.alpha: .* number"),
        ({"kind": "ntk", "alpha": 1e308}, r"rope\.alpha: .* 1000000, not 1e\+308"),
        ({"kind": ["ntk"]}, "rope: "),
    ],
)
def test_what_no_recipe_could_have_is_one_line(rope, said):
    with pytest.raises(UserError, match=said):
        with_rope(MODEL, rope, 48)


def test_an_original_length_that_is_given_wins():
    given = {"kind": "yarn", "original_length": 8}
    assert with_rope(MODEL, given, 48).rope == YarnRopeScaling(
        kind="yarn", factor=6.0, original_length=8
    )
    bands = {"kind": "llama3", "low_freq_factor": 1, "high_freq_factor": 4}
    assert with_rope(MODEL, bands, 48).rope.factor == 3.0


def test_labels_are_short():
    labels = [rope_label(rope) for rope in ("none", NTK, {"kind": "yarn"})]
    assert labels == ["none", "ntk alpha=4", "yarn"]


def test_a_length_that_no_factor_reaches_is_one_line():
    with pytest.raises(UserError, match="linear: no factor takes 16 positions to 2,000,000,000"):
        with_rope(MODEL, "linear", 2_000_000_000)


@pytest.mark.parametrize("rope", [NTK, "dynamic", "adaptive"])
def test_heads_too_narrow_for_a_scaling_are_one_line(rope):
    with pytest.raises(UserError, match=r"rope\.kind=.* needs .*head_dim .* 4, not 2$"):
        with_rope(tiny.config(head_dim=2), rope, 48)
