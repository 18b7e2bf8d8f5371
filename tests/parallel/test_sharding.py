"""Meshes, and the strict resolver from logical axes to placement."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import tiny

from jllama.config import MeshConfig, ShardingConfig
from jllama.errors import UserError
from jllama.model import llama
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement, constrain


def placement(rules=None, **sizes):
    sizes = {"fsdp": 1} | sizes
    devices = jax.devices()[: math.prod(sizes.values())]
    return Placement(make_mesh(MeshConfig(**sizes), devices), ShardingConfig(**rules or {}))


def message(p, shape, axes, name="layers/mlp/gate/kernel"):
    with pytest.raises(UserError) as error:
        p.spec(shape, axes, name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_first_candidate_that_divides_wins():
    p = placement({"vocab": (("fsdp", "tensor"), ("tensor",), None)}, fsdp=2, tensor=2)
    assert p.spec((8, 3), ("vocab", "norm"), "x") == jax.P(("fsdp", "tensor"), None)
    assert p.spec((6, 3), ("vocab", "norm"), "x") == jax.P("tensor", None)
    assert p.spec((5, 3), ("vocab", "norm"), "x") == jax.P(None, None)


def test_a_mesh_axis_serves_one_dimension():
    p = placement({"heads": (("fsdp",), ("tensor",))}, fsdp=2, tensor=2)
    assert p.spec((4, 4), ("embed", "heads"), "x") == jax.P(("fsdp", "context"), "tensor")


def test_mesh_axis_used_twice_is_an_error_when_nothing_else_is_left():
    p = placement({"ffn": (("fsdp",),)}, fsdp=2)
    said = message(p, (48, 80), ("embed", "ffn"))
    for part in ("layers/mlp/gate/kernel", "(48, 80)", "'ffn'", "fsdp (taken)", "sharding.ffn"):
        assert part in said


def test_nothing_that_divides_is_an_error_with_the_way_out():
    said = message(placement(tensor=3), (48, 80), ("embed", "ffn"))
    for part in ("layers/mlp/gate/kernel", "(48, 80)", "'ffn'", "80", "3 does not divide", "null"):
        assert part in said
    for candidates in ((("tensor",), ("fsdp",)), (("tensor",), None)):
        rules = {"embed": (None,), "ffn": candidates}
        placement(rules, tensor=3).spec((48, 80), ("embed", "ffn"), "x")
    placement(tensor=4).spec((48, 80), ("embed", "ffn"), "x")


def test_a_candidate_is_named_by_the_axes_of_several_devices():
    rules = {"table_embed": (("tensor", "fsdp", "context"), ("tensor", "fsdp"), ("fsdp",))}
    said = message(placement(rules, fsdp=5), (96, 48), ("vocab", "table_embed"))
    assert "no candidate fits: fsdp (5 does not divide); change" in said


def test_unknown_axis_is_an_error():
    said = message(placement(), (4,), ("widht",))
    assert "layers/mlp/gate/kernel" in said
    assert "'widht'" in said


def test_wrong_number_of_axes_is_an_error():
    assert "(4, 4)" in message(placement(), (4, 4), ("embed",))


def test_no_axis_and_null_are_whole():
    p = placement(fsdp=2)
    assert p.spec((4, 4), (None, "norm"), "x") == jax.P(None, None)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"replica": 2, "fsdp": 4}]
)
def test_every_parameter_of_a_model_is_placed(sizes):
    p = placement(**sizes)
    specs = llama.param_specs(tiny.config(vocab_size=96, qk_norm=True), tiny.compute())
    for path, spec in jax.tree.leaves_with_path(specs):
        p.sharding(spec.shape, spec.axes, jax.tree_util.keystr(path))
    gate = specs["layers"]["mlp"]["gate"]["kernel"]
    assert p.spec(gate.shape, gate.axes, "gate") == jax.P(None, ("fsdp", "context"), "tensor")


def test_batch_rows_are_spread_over_the_data_axes():
    p = placement(replica=2, fsdp=2)
    batch = p.put_batch({"tokens": np.arange(24).reshape(8, 3)})
    assert [s.data.shape for s in batch["tokens"].addressable_shards] == [(2, 3)] * 4
    with pytest.raises(UserError, match=r"tokens: axis 'batch' of shape \(6, 3\)"):
        p.put_batch({"tokens": np.zeros((6, 3))})


def test_constrain_pins_only_while_a_placement_is_active():
    p, x = placement(fsdp=2, tensor=2), np.zeros((4, 6, 8), np.float32)
    assert constrain(x, "batch", "seq", "act_ffn") is x
    with p.active():
        y = jax.jit(lambda x: constrain(x, "batch", "seq", "act_ffn"))(x)
    assert {s.data.shape for s in y.addressable_shards} == {(2, 6, 4)}
    assert constrain(x, "batch", "seq", "act_ffn") is x


def test_constrain_is_as_strict():
    with placement(tensor=3).active(), pytest.raises(UserError, match="act_ffn"):
        constrain(np.zeros((4, 6, 8), np.float32), "batch", "seq", "act_ffn")


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"context": 4}])
def test_logits_on_a_mesh_equal_one_device(sizes):
    p = placement(**sizes)
    model, compute = tiny.config(vocab_size=96), tiny.compute()
    params, tokens = tiny.params(model), tiny.tokens(4, 16, vocab_size=96)
    placed = jax.tree.map(
        lambda x, s: jax.device_put(x, p.sharding(s.shape, s.axes, "x")),
        params,
        llama.param_specs(model, compute),
    )

    @jax.jit
    def run(params, batch):
        with p.active():
            positions = jax.numpy.broadcast_to(jax.numpy.arange(16), (4, 16))
            hidden, _ = llama.apply(params, model, compute, batch["tokens"], positions)
            return llama.logits(params, model, hidden)

    got = run(placed, p.put_batch({"tokens": tokens}))
    assert len(got.sharding.device_set) == 4
    assert tiny.relative_error(got, tiny.logits(params, model, tokens)) < 1e-6


def test_every_rule_of_the_config_names_mesh_axes():
    rules = ShardingConfig()
    for field in dataclasses.fields(rules):
        assert getattr(rules, field.name), field.name


@pytest.mark.parametrize(
    ("candidates", "words"),
    [((("fsdp",), ()), "write null"), ((None, ("fsdp",)), "null must be the last")],
)
def test_a_candidate_that_could_never_matter_is_an_error(candidates, words):
    with pytest.raises(ValueError, match=words):
        ShardingConfig(embed=candidates)
    ShardingConfig(embed=(("fsdp",), None))
