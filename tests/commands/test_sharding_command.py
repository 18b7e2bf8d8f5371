"""`jllama sharding`: what it says is where the arrays are; bad input is one line."""

import collections
import json

import jax
import pytest
import recipes

from jllama import cli
from jllama.config import MeshConfig, recipe
from jllama.model.param import dotted
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.train.state import define_state, init_state


def call(capsys, *args):
    assert cli.main(["sharding", *args]) == 0
    return capsys.readouterr().out


def figures(capsys, *args):
    return json.loads(call(capsys, *args, "--json"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_its_bytes_are_those_that_a_device_holds(optimizer, tmp_path, capsys):
    muon = (
        "training.optimizer={kind: muon, momentum: 0.9, beta1: 0.9, beta2: 0.95, eps: 1e-8,"
        " weight_decay: 0.1, clip_norm: 1.0}"
    )
    # 97 rows stay together on tensor=4, and two key/value heads are on all of its devices.
    given = ["compute.param_dtype=bfloat16", *([muon] if optimizer == "muon" else [])]
    config = recipes.in_memory(*given, vocab_size=97)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(config))
    got = figures(capsys, "--config", str(path), "--mesh", "fsdp=2,tensor=4")

    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4), jax.devices())
    state = init_state(define_state(config, Placement(mesh, config.sharding)), 0)
    first = {
        dotted(p): x.addressable_shards[0].data
        for p, x in jax.tree.leaves_with_path(state.trainable)
    }
    assert {p["parameter"]: p["bytes_per_device"] for p in got["parameters"]} == {
        name: x.nbytes for name, x in first.items()
    }
    assert got["bytes_per_device"] == sum(x.nbytes for x in first.values())
    held = [x.addressable_shards[0].data for x in jax.tree.leaves(state.opt_state) if x.size > 3]
    assert got["optimizer_bytes_per_device"] == sum(x.nbytes for x in held)
    by_shape = collections.Counter(p["optimizer_bytes_per_device"] for p in got["parameters"])
    assert len(by_shape) > 3


def test_one_line_for_each_parameter_and_their_sum(capsys):
    lines = call(capsys, "llama2-7b", "--mesh", "fsdp=8,tensor=4").splitlines()
    assert lines[0].startswith("32 devices: replica=1, fsdp=8")
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:15]}
    assert len(rows) == 13
    assert rows["layers.attention.q.kernel"] == [
        "32x4096x32x128", "layers,embed,heads,head_dim", "embed/fsdp", "heads/tensor",
        "67,108,864", "134,217,728",
    ]  # fmt: skip
    assert rows["final_norm.scale"] == ["4096", "norm", "whole", "16,384", "32,768"]
    total, optimizer = (int(n.replace(",", "")) for n in rows["total"])
    norms = 4 * (2 * 32 + 1) * 4096
    assert total == (4 * 6_738_415_616 - norms) // 32 + norms  # the published count
    assert optimizer == 2 * total


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["llama2-7b", "--mesh", "fsdp=512"], "32,000 of 32,000 rows and 8 of 4,096 columns"),
        (["llama2-7b", "--mesh", "fsdp=64,tensor=8"], "4,000 of 32,000 rows and 64 of 4,096"),
        (
            ["chinese-llama-7b", "--mesh", "fsdp=64,tensor=8"],
            "49,953 does not divide by tensor=8: embedding and head keep all rows together, and a"
            " device has 8 of 4,096 columns",
        ),
        (["llama3.2-1b", "--mesh", "tensor=8"], "of embedding a device has 16,032 of 128,256 rows"),
        (
            ["llama3.1-405b", "--mesh", "fsdp=32,tensor=16"],
            "along tensor=16: layers.attention.k.kernel, layers.attention.v.kernel (528,482,304",
        ),
        (
            ["llama2-7b", "--mesh", "replica=2,fsdp=8,context=2"],
            "every parameter is the same along replica=2",
        ),
    ],
    ids=str,
)
def test_it_says_what_is_whole(args, said, capsys):
    assert any(said in note for note in figures(capsys, *args)["notes"])
    assert said in call(capsys, *args)


def test_a_recipe_brings_its_own_mesh_and_takes_overrides(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(recipes.in_memory("mesh.tensor=2")))
    got = figures(capsys, "--config", str(path), "--devices", "8")
    assert (got["devices"], got["mesh"]["fsdp"], got["mesh"]["tensor"]) == (8, 4, 2)
    more = ["--model.ffn_dim=96", "--sharding.embed=[null]", "--sharding.table_embed=[null]"]
    got = figures(capsys, "--config", str(path), "--devices", "8", *more)
    gate = next(p for p in got["parameters"] if "gate" in p["parameter"])
    assert gate["shape"] == [2, 48, 96]
    assert gate["placement"] == [[], [], ["tensor"]]


def test_devices_alone_are_the_default_mesh(capsys):
    got = figures(capsys, "llama2-7b", "--devices", "16")
    assert got["mesh"] == {"replica": 1, "fsdp": 16, "context": 1, "tensor": 1}


def test_it_starts_no_device(monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("asked for the devices"))
    assert figures(capsys, "llama2-7b", "--mesh", "fsdp=512,tensor=8")["devices"] == 4096


RECIPE = "configs/train/tiny.yaml"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "give either MODEL, or --config"),
        (["tiny", "--config", RECIPE], "give either MODEL, or --config"),
        (["tiny"], "give --mesh AXIS=SIZE,..., such as --mesh fsdp=8,tensor=2, or --devices N"),
        (["llama9", "--mesh", "fsdp=8"], "no 'llama9'"),
        (["tiny", "--mesh", "width=8"], "'width=8' is no AXIS=SIZE"),
        (["tiny", "--mesh", "fsdp"], "'fsdp': the size must be a whole number"),
        (["tiny", "--mesh", "fsdp=0"], "sizes must be at least 1"),
        (["tiny", "--mesh", "fsdp=-1,tensor=-1"], "or -1 for one of them"),
        (
            ["tiny", "--mesh", "fsdp=-1"],
            "--mesh fsdp=-1 takes the rest of the devices: give --devices N\n",
        ),
        (
            ["--config", RECIPE],
            "mesh.fsdp=-1 takes the rest of the devices: give --devices N, or give --mesh\n",
        ),
        (["tiny", "--mesh", "fsdp=2", "--devices", "0"], "--devices=0"),
        (["tiny", "--mesh", "fsdp=2", "--devices", "3"], "does not fill 3 devices"),
        (
            ["tiny", "--mesh", "fsdp=2", "--model.ffn_dim=8"],
            "--model.ffn_dim=8: keys of a recipe go with --config FILE, not with MODEL\n",
        ),
        (["llama2-7b", "--mesh.fsdp=8", "--mesh.tensor", "4"], "--mesh fsdp=8,tensor=4\n"),
        (["llama2-7b", "--mesh", "tensor=5"], "layers.attention.o.kernel: axis 'heads'"),
        (["llama2-7b", "--mesh", "fsdp=3"], "no candidate fits: fsdp (3 does not divide); change"),
        (["--config", RECIPE, "--mesh", "fsdp=1,replica=1024"], "rows of a microbatch"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(args, said, capsys):
    assert cli.main(["sharding", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_the_command_that_an_error_names_is_taken(capsys):
    for args, better in (
        (["tiny"], ["tiny", "--mesh", "fsdp=8,tensor=2"]),
        (["stories-15m"], ["stories-15m", "--mesh", "fsdp=8,tensor=2"]),
        (["tiny"], ["tiny", "--devices", "8"]),
        (["tiny", "--mesh", "fsdp=-1"], ["tiny", "--mesh", "fsdp=-1", "--devices", "8"]),
        (["--config", RECIPE], ["--config", RECIPE, "--devices", "8"]),
        (["--config", RECIPE], ["--config", RECIPE, "--mesh", "fsdp=8"]),
        (["tiny", "--mesh.fsdp=8", "--mesh.tensor", "2"], ["tiny", "--mesh", "fsdp=8,tensor=2"]),
    ):
        assert cli.main(["sharding", *args]) == 2
        assert better[-2] in capsys.readouterr().err
        assert cli.main(["sharding", *better]) == 0
