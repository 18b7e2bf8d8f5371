"""The table of names covers the model, and its layouts are those of the other projects."""

import jax
import numpy as np
import pytest
import tiny

from jllama.errors import UserError
from jllama.interop.names import NAMES, file_shape, name_of
from jllama.interop.tensors import from_file, to_file
from jllama.model import llama
from jllama.model.param import dotted

MODEL = tiny.config(num_kv_heads=2)
SPECS = {
    dotted(path): spec
    for path, spec in jax.tree.leaves_with_path(llama.param_specs(MODEL, tiny.compute()))
}


def test_the_table_has_every_parameter_once():
    assert sorted(name.path for name in NAMES) == sorted(SPECS)
    for format in ("hf", "meta", "gguf"):
        named = [name.of(format, 7) for name in NAMES]
        assert len(set(named)) == len(named)
    for name in NAMES:
        assert name.stacked == (SPECS[name.path].axes[0] == "layers")


def test_a_parameter_without_a_name_in_other_formats_is_an_error():
    with pytest.raises(UserError, match=r"^layers\.attention\.q_norm\.scale: "):
        name_of("layers.attention.q_norm.scale")


def _layer(name):
    spec = SPECS[name.path]
    return (spec.shape[1:] if name.stacked else spec.shape), spec.inputs


@pytest.mark.parametrize("name", NAMES, ids=lambda n: n.path)
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_layout_and_its_inverse(name, interleaved):
    shape, inputs = _layer(name)
    interleaved = interleaved and name.rotary
    here = np.random.default_rng(0).normal(size=shape)
    there = to_file(here, inputs, interleaved=interleaved)
    assert there.shape == file_shape(shape, inputs)
    np.testing.assert_array_equal(from_file(there, shape, inputs, interleaved=interleaved), here)


def test_a_file_has_outputs_by_inputs():
    rng = np.random.default_rng(1)
    x = rng.normal(size=MODEL.hidden_dim)
    q = rng.normal(size=_layer(name_of("layers.attention.q.kernel"))[0])  # [D,H,N]
    there = to_file(q, 1, interleaved=False)
    np.testing.assert_allclose(there @ x, np.einsum("D,DHN->HN", x, q).ravel())
    heads = rng.normal(size=(MODEL.num_heads, MODEL.head_dim))
    o = rng.normal(size=_layer(name_of("layers.attention.o.kernel"))[0])  # [H,N,D]
    there = to_file(o, 2, interleaved=False)
    np.testing.assert_allclose(there @ heads.ravel(), np.einsum("HN,HND->D", heads, o))


def test_interleaved_rows_turn_as_complex_pairs():
    """Meta's RoPE: neighbours are the parts of a complex number (llama, model.py)."""
    H, N, position = 3, 8, 5
    frequencies = 1e4 ** (-np.arange(0, N, 2) / N)
    half = np.random.default_rng(2).normal(size=(1, H, N))  # of one input: the query itself
    a, b = np.split(half[0], 2, axis=-1)
    cos, sin = np.cos(position * frequencies), np.sin(position * frequencies)
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    rows = to_file(half, 1, interleaved=True).reshape(H, N)
    pairs = rows[:, 0::2] + 1j * rows[:, 1::2]
    wanted = pairs * np.exp(1j * position * frequencies)
    got = to_file(turned[None], 1, interleaved=True).reshape(H, N)
    np.testing.assert_allclose(got[:, 0::2] + 1j * got[:, 1::2], wanted)
