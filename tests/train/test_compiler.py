"""The options with which XLA compiles the step."""

import jax
import pytest
import recipes
import tpu

from jllama.config import MeshConfig
from jllama.errors import UserError
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.train import compiler
from jllama.train.compiler import as_text, with_options, xla_options
from jllama.train.step import make_eval_step


def placement(devices=None, **mesh):
    return Placement(make_mesh(MeshConfig(**mesh), devices), recipes.in_memory().sharding)


def options(*overrides, on=None):
    return xla_options(recipes.in_memory(*overrides).compute, on or placement())


def test_a_cpu_has_none_but_those_of_the_recipe():
    assert options() == {}
    chosen = options("compute.xla.cpu.xla_cpu_enable_fast_math=true", "compute.xla.tpu.unread=1")
    assert chosen == {"xla_cpu_enable_fast_math": True}
    assert as_text(chosen | {"n": 3}) == "xla_cpu_enable_fast_math=true n=3"


@pytest.mark.parametrize(
    "option,said",
    [
        ("xla_of_tomorrow=true", r"compute\.xla\.cpu: No such compile option: 'xla_of_tomorrow'"),
        ("xla_cpu_enable_fast_math=maybe", r"compute\.xla\.cpu: .*'maybe' is not a valid bool"),
    ],
)
def test_an_option_that_the_compiler_refuses_is_an_error_of_the_recipe(option, said):
    with pytest.raises(UserError, match=said):
        options(f"compute.xla.cpu.{option}")


def test_a_default_that_the_compiler_does_not_know_is_left_out(monkeypatch):
    known = {"xla_cpu_enable_fast_math": False}
    monkeypatch.setattr(compiler, "default_options", lambda placement: known | {"xla_gone": 1})
    assert options() == known
    # The recipe takes a default away with null, and changes one.
    assert options("compute.xla.cpu.xla_cpu_enable_fast_math=null") == {}
    with pytest.raises(UserError, match="xla_gone"):
        options("compute.xla.cpu.xla_gone=2")


def test_a_run_stores_the_options_that_it_was_compiled_with(monkeypatch):
    defaults = {"xla_cpu_enable_fast_math": False, "xla_gone": 1}
    monkeypatch.setattr(compiler, "default_options", lambda placement: defaults)
    config = with_options(recipes.in_memory(), placement())
    assert config.compute.xla.cpu == (("xla_cpu_enable_fast_math", False),)
    assert with_options(config, placement()) == config, "it is what it was when the run resumes"
    without = recipes.in_memory("compute.xla.cpu.xla_cpu_enable_fast_math=null")
    assert with_options(without, placement()).compute.xla.cpu == (
        ("xla_cpu_enable_fast_math", None),
    )


def test_the_options_reach_the_compiled_step(monkeypatch):
    seen = []
    jit = jax.jit

    def noting(*args, **kwargs):
        seen.append(kwargs.get("compiler_options"))
        return jit(*args, **kwargs)

    monkeypatch.setattr("jllama.train.step.jax.jit", noting)
    config = recipes.in_memory("compute.xla.cpu.xla_cpu_enable_fast_math=false")
    make_eval_step(config, lambda *_: (0, 0, {}), placement())
    assert seen[-1] == {"xla_cpu_enable_fast_math": False}


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_this_compiler_knows_every_default_for_a_tpu(no_cache, topology):
    megacore = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    chips = tpu.devices(topology, chips_per_host_bounds=(2, 2, 1), **megacore)
    for mesh in ({}, {"fsdp": 2, "tensor": 2}):
        on = placement(chips, **mesh)
        assert options(on=on) == compiler.default_options(on)
    assert "xla_jf_bf16_propagation" not in options(on=on)
    first = next(iter(options(on=placement(chips))))
    assert first not in options(f"compute.xla.tpu.{first}=null", on=placement(chips))
