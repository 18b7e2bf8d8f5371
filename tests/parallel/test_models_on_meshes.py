"""Every shipped model on every mesh that divides it; needs no array and no device."""

import functools
import math

import jax
import pytest

from jllama.config import ComputeConfig, MeshConfig, ShardingConfig
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.model import llama
from jllama.parallel.mesh import abstract_mesh
from jllama.parallel.sharding import Placement

MESHES = [
    {"fsdp": 8},
    {"fsdp": 512},
    {"tensor": 8},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 8, "tensor": 4},
    {"fsdp": 64, "tensor": 8},
    {"fsdp": 128, "tensor": 8},
    {"fsdp": 32, "tensor": 16},
    {"replica": 8, "fsdp": 64},
    {"replica": 2, "fsdp": 16, "tensor": 4, "context": 4},
]


def placement(**sizes):
    mesh = MeshConfig(**{"fsdp": 1, **sizes})
    return Placement(abstract_mesh(mesh, math.prod(sizes.values())), ShardingConfig())


@functools.cache
def parameters(name):
    specs = llama.param_specs(recipes.load_model(name), ComputeConfig(dtype="float32"))
    return [(jax.tree_util.keystr(path), s) for path, s in jax.tree.leaves_with_path(specs)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", recipes.model_names())
def test_a_mesh_that_divides_the_model_places_it(name, sizes):
    model, p = recipes.load_model(name), placement(**sizes)
    fsdp, tensor = p.mesh.shape["fsdp"], p.mesh.shape["tensor"]
    if model.hidden_dim % fsdp or model.num_heads % tensor or model.ffn_dim % tensor:
        with pytest.raises(UserError, match="does not divide"):
            for path, s in parameters(name):
                p.spec(s.shape, s.axes, path)
        return
    for path, s in parameters(name):
        whole_vocab = "vocab" in s.axes and s.shape[0] % tensor
        used = {axis for part in p.mesh_axes(s.shape, s.axes, path) for axis in part}
        spread = {a for a in ("fsdp", "context", "tensor") if p.mesh.shape[a] > 1}
        if len(s.shape) == 1 or "norm" in s.axes:
            assert not used
        elif ("kv_heads" in s.axes and model.num_kv_heads % tensor) or (
            whole_vocab and s.shape[1] % (fsdp * p.mesh.shape["context"] * tensor)
        ):
            assert used == spread - {"tensor"}
        else:
            assert used == spread, path
    B, T = 2 * math.prod(sizes.values()), 2048
    for axes, shape in {
        ("batch", "block_seq", "act_embed"): (B, T, model.hidden_dim),
        ("batch", "seq", "act_heads", None): (B, T, model.num_heads, model.head_dim),
        ("batch", "seq", "act_kv_heads", None): (B, T, model.num_kv_heads, model.head_dim),
        ("batch", "seq", "act_ffn"): (B, T, model.ffn_dim),
    }.items():
        rows = tuple(axis for axis in ("replica", "fsdp") if p.mesh.shape[axis] > 1)
        assert p.mesh_axes(shape, axes, "activation")[0] == rows


@pytest.mark.parametrize(
    ("name", "sizes", "rows", "columns"),
    [
        # The vocabulary goes to tensor, the width to fsdp; what cannot go there stays together.
        ("llama2-7b", {"fsdp": 512}, 32_000, 4096 // 512),
        ("llama2-7b", {"fsdp": 64, "tensor": 8}, 32_000 // 8, 4096 // 64),
        ("llama3.1-405b", {"fsdp": 128, "tensor": 8}, 128_256 // 8, 16384 // 128),
        ("chinese-llama-7b", {"fsdp": 8}, 49_953, 4096 // 8),
        ("chinese-llama-7b", {"fsdp": 64, "tensor": 8}, 49_953, 4096 // 512),
    ],
)
def test_the_part_of_the_vocabulary_that_a_device_has(name, sizes, rows, columns):
    p = placement(**sizes)
    tables = [s for _, s in parameters(name) if s.axes == llama.TABLE_AXES]
    assert len(tables) == 2
    for s in tables:
        parts = p.mesh_axes(s.shape, s.axes, "table")
        got = [
            n // math.prod(p.mesh.shape[a] for a in part)
            for n, part in zip(s.shape, parts, strict=True)
        ]
        assert got == [rows, columns]
