"""`jllama fingerprint`: the digest of a checkpoint, on any mesh."""

import jax
import pytest
import recipes

from jllama import cli
from jllama.config import MeshConfig, recipe
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.store.checkpoint import Checkpoints
from jllama.store.fingerprint import fingerprint
from jllama.train.state import define_state, init_state, to_trees


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with the steps 1 and 2, and their digests."""
    folder, config = tmp_path_factory.mktemp("run"), recipes.in_memory()
    (folder / "config.yaml").write_text(recipe.to_yaml(config))
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), config.sharding)
    definition = define_state(config, placement)
    checkpoints, digests = Checkpoints(folder, keep=2), {}
    for step in (1, 2):
        state = init_state(definition, step)
        state = state._replace(step=state.step + step)
        checkpoints.save(step, **to_trees(state))
        digests[step] = fingerprint(state)
    checkpoints.close()
    return folder, digests


@pytest.mark.parametrize(
    ("args", "step"),
    [
        ([], 2),
        (["--step", "1"], 1),
        (["--mesh", "fsdp=4", "--mesh", "tensor=2"], 2),
        (["--mesh", "fsdp=4,tensor=2"], 2),
    ],
    ids=str,
)
def test_it_prints_the_digest_of_the_state(run, args, step, capsys):
    folder, digests = run
    assert digests[1] != digests[2]
    assert cli.main(["fingerprint", str(folder), *args]) == 0
    assert capsys.readouterr().out == f"{digests[step]}\n"


@pytest.mark.parametrize("count", [8, 7])  # 7 does not divide the width, 48
def test_the_devices_that_a_run_had_are_not_needed(run, count, tmp_path, monkeypatch, capsys):
    folder, digests = run
    elsewhere = recipes.in_memory("mesh.fsdp=64", "mesh.tensor=2")
    (tmp_path / "config.yaml").write_text(recipe.to_yaml(elsewhere))
    (tmp_path / "checkpoints").symlink_to(folder / "checkpoints")
    here = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda: here)
    assert cli.main(["fingerprint", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{digests[2]}\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--step", "9"], "no step 9; there are: 1, 2"),
        (["--mesh", "fsdp=3"], "error: --mesh fsdp=3: replica=1, fsdp=3, context=1, tensor=1 does"),
        (["--mesh", "tensor=8"], "error: --mesh tensor=8: layers.attention.o.kernel: axis 'heads'"),
        (["--mesh", "width=3"], "error: --mesh: 'width=3' is no AXIS=SIZE"),
        (["--mesh", "fsdp"], "error: --mesh: 'fsdp': the size must be a whole number"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(run, args, said, capsys):
    assert cli.main(["fingerprint", str(run[0]), *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_a_folder_without_checkpoint_or_run_is_an_error(run, tmp_path, capsys):
    assert cli.main(["fingerprint", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text((run[0] / "config.yaml").read_text())
    assert cli.main(["fingerprint", str(tmp_path)]) == 2
    assert "no checkpoint yet" in capsys.readouterr().err
