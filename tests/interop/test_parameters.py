"""Tensors of files become parameters and back, bit for bit and on any mesh; errors name all."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jllama.config import MeshConfig, ShardingConfig
from jllama.errors import UserError
from jllama.interop.parameters import file_tensors, match, read_params, widest_dtype
from jllama.interop.tensors import cast, in_file, joined
from jllama.model import llama
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement

MODEL = tiny.config(num_kv_heads=2, vocab_size=96)
SPECS = llama.param_specs(MODEL, tiny.compute())
WHERE = Path("somewhere")


@dataclasses.dataclass
class Here:
    """A tensor in memory."""

    array: np.ndarray

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype.name

    def read(self):
        return self.array


@pytest.fixture(scope="module")
def params():
    return tiny.params(MODEL)


@pytest.fixture
def tensors(params):
    found = file_tensors(params, SPECS, "hf", interleaved=False)
    return {name: Here(tensor.read()) for name, tensor in found.items()}


def read(tensors, *, dtype="float32", interleaved=False, format="hf", **mesh):
    devices = jax.devices()[: int(np.prod(list(mesh.values()) or [1]))]
    placement = Placement(make_mesh(MeshConfig(**({"fsdp": 1} | mesh)), devices), ShardingConfig())
    placed = llama.placed_shapes(MODEL, placement, dtype, "float32")
    found = match(tensors, SPECS, format, WHERE)
    return read_params(found, SPECS, placed, interleaved=interleaved, title="read"), placed


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "context": 2}], ids=str)
@pytest.mark.parametrize(("format", "interleaved"), [("hf", False), ("meta", True)])
def test_every_bit_arrives_where_it_is_placed(params, format, interleaved, mesh):
    tensors = file_tensors(params, SPECS, format, interleaved=interleaved)
    got, placed = read(tensors, format=format, interleaved=interleaved, **mesh)
    for a, b, c in zip(*map(jax.tree.leaves, (got, params, placed)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == c.sharding


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision_is_kept_or_widened_exactly(tensors, stored):
    half = {name: Here(t.array.astype(jnp.dtype(stored))) for name, t in tensors.items()}
    same, wide = read(half, dtype=stored)[0], read(half)[0]
    assert same["head"]["weight"].dtype == stored
    assert same["final_norm"]["scale"].dtype == "float32"
    np.testing.assert_array_equal(same["head"]["weight"], half["lm_head.weight"].array)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), b)


def test_the_widest_dtype_holds_all(tensors):
    found = match(tensors, SPECS, "hf", WHERE)
    assert widest_dtype(found, scales=False) == widest_dtype(found, scales=True) == "float32"
    half = {name: Here(t.array.astype(np.float16)) for name, t in tensors.items()}
    assert widest_dtype(match(half, SPECS, "hf", WHERE), scales=False) == "float16"
    half["lm_head.weight"] = Here(half["lm_head.weight"].array.astype(jnp.bfloat16))
    found = match(half, SPECS, "hf", WHERE)
    assert (widest_dtype(found, scales=False), widest_dtype(found, scales=True)) == (
        "float32",
        "float16",
    )


def test_all_wrong_tensors_are_listed_in_one_line_by_both_names(tensors):
    for layer in range(3):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.norm.weight"] = Here(np.zeros(5, np.float32))
    tensors["model.layers.0.self_attn.q_proj.bias"] = Here(np.zeros(64, np.float32))
    tensors["model.layers.3.input_layernorm.weight"] = Here(np.zeros(48, np.float32))
    tensors["model.layers.2.self_attn.o_proj.weight"] = Here(np.zeros((48, 64), np.int8))
    with pytest.raises(UserError) as e:
        match(tensors, SPECS, "hf", WHERE)
    said = str(e.value)
    assert "\n" not in said
    for part in (
        "somewhere: ",
        "missing: model.layers.1.self_attn.q_proj.weight (ours layers.attention.q.kernel)",
        "model.layers.{0-2}.mlp.up_proj.weight (ours layers.mlp.up.kernel)",
        "misshapen: model.norm.weight (ours final_norm.scale: [5], and the config makes it [48])",
        "not weights: model.layers.2.self_attn.o_proj.weight (ours layers.attention.o.kernel: int8",
        "model.layers.0.self_attn.q_proj.bias (no such parameter)",
        "model.layers.3.input_layernorm.weight (no such parameter)",
    ):
        assert part in said


def test_a_config_of_a_billion_layers_is_refused_at_once(tensors):
    specs = llama.param_specs(dataclasses.replace(MODEL, num_layers=10**9), tiny.compute())
    with pytest.raises(UserError, match="1,000,000,000 layers by the config, and 30 tensors"):
        match(tensors, specs, "hf", WHERE)


def test_a_tensor_is_read_from_its_place_in_the_file(tmp_path):
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    file = tmp_path / "data"
    file.write_bytes(b"12345678" + whole.tobytes())
    np.testing.assert_array_equal(in_file(file, 8, (4, 6), "float32").read(), whole)
    np.testing.assert_array_equal(in_file(file, 8 + 24, (3, 6), "float32").read(), whole[1:])
    with pytest.raises(UserError, match=r"data: truncated at byte 104"):
        in_file(file, 12, (4, 6), "float32").read()


@pytest.mark.parametrize("axis", [0, 1])
def test_shards_are_joined_along_their_axis(tmp_path, axis):
    whole = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float16)
    parts = []
    for i, part in enumerate(np.split(whole, 2, axis)):
        (tmp_path / str(i)).write_bytes(part.tobytes())
        parts.append(in_file(tmp_path / str(i), 0, part.shape, "float16"))
    whole_again = joined(parts, axis)
    assert (whole_again.shape, whole_again.dtype) == ((4, 6), "float16")
    np.testing.assert_array_equal(whole_again.read(), whole)


def test_a_value_that_does_not_fit_is_an_error_and_no_infinity():
    array = np.array([1.0, -7e4], np.float32)
    assert cast(array, "bfloat16", "w").dtype == "bfloat16"
    with pytest.raises(UserError, match=r"^w: 70000 does not fit float16"):
        cast(array, "float16", "w")
    with pytest.raises(UserError, match=r"^w: 3\.4e\+38 does not fit bfloat16"):
        cast(np.array([np.inf, 3.4e38], np.float32), "bfloat16", "w")
    # What was infinite before is the model's own.
    assert np.isinf(cast(np.array([np.inf], np.float32), "float16", "w")).all()


def test_a_value_that_does_not_fit_the_dtype_of_the_placement_is_an_error(tensors):
    head = tensors["lm_head.weight"].array.copy()
    head[3, 3] = 3.4e38
    tensors["lm_head.weight"] = Here(head)
    with pytest.raises(UserError, match=r"^head\.weight: 3\.4e\+38 does not fit bfloat16"):
        read(tensors, dtype="bfloat16")


def test_a_transposed_copy_is_the_array():
    for dtype in ("float32", "bfloat16"):
        array = np.random.default_rng(0).normal(size=(7, 300, 5)).astype(jnp.dtype(dtype))
        for view in (array.T, array.swapaxes(0, 1), array[:, ::2]):
            out = cast(view, dtype, "w")
            assert out.flags.c_contiguous
            np.testing.assert_array_equal(out, view)
