"""Checkpoints: bit-equal on any mesh, the newest kept, and errors that say what is wrong."""

import gc
import math
import re
import shutil
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import recipes

from jllama.config import MeshConfig
from jllama.errors import StorageError, UserError
from jllama.files import storage
from jllama.model import llama
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.store import staging
from jllama.store.checkpoint import Checkpoints, load_params
from jllama.store.find import latest_step
from jllama.store.fingerprint import fingerprint
from jllama.train.state import define_state, init_state, load_state, to_trees

CONFIG = recipes.in_memory()


def definition(config=CONFIG, **sizes):
    sizes = {"fsdp": 1} | sizes
    devices = jax.devices()[: math.prod(sizes.values())]
    return define_state(config, Placement(make_mesh(MeshConfig(**sizes), devices), config.sharding))


def state(where, seed=0):
    """A state in which no two leaves are alike, the optimizer's zeros included."""
    fresh = init_state(where, seed)
    leaves, tree = jax.tree.flatten(fresh)
    leaves = [x + np.asarray(i + seed, x.dtype) for i, x in enumerate(leaves)]
    return jax.device_put(tree.unflatten(leaves), where.shardings)


def save(folder, states, keep=2, where=None):
    checkpoints = Checkpoints(folder, keep)
    for step, one in states.items():
        checkpoints.save(step, **to_trees(one))
    checkpoints.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with the steps 4 and 6, saved on eight devices; step 2 was dropped."""
    folder = tmp_path_factory.mktemp("run")
    where = definition(fsdp=8)
    save(folder, {step: state(where, step) for step in (2, 4, 6)})
    return folder


def test_several_processes_save_to_a_store_that_orbax_writes_to(monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    # As tests/train/test_hosts.py does.
    said = "go to gs:// or a mounted folder; mount the bucket, or choose another run.folder"
    with pytest.raises(UserError, match=said):
        Checkpoints(storage.path("s3://bucket/runs/run"), 1)


def test_the_newest_are_kept(run):
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["4", "6"]
    assert latest_step(run) == 6
    assert latest_step(run / "absent") is None


def test_a_state_comes_back_bit_for_bit_on_any_mesh(run, tmp_path):
    saved = state(definition(fsdp=8), 6)
    digest = fingerprint(saved)
    for number, sizes in enumerate(({"fsdp": 2}, {}, {"fsdp": 4, "tensor": 2})):
        where = definition(**sizes)
        back = load_state(run, 6, where)
        placed = jax.tree.map(lambda x, s: x.sharding == s, back, where.shardings)
        assert all(jax.tree.leaves(placed))
        jax.tree.map(np.testing.assert_array_equal, back, saved)
        assert fingerprint(back) == digest
        # And once more from there.
        run = tmp_path / str(number)
        save(run, {6: back})


def test_an_older_step_is_itself(run):
    where = definition()
    got = load_state(run, 4, where)
    assert fingerprint(got) == fingerprint(state(where, 4))


def test_the_newest_step_is_what_was_saved_last(tmp_path):
    where = definition()
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.latest() is None
    checkpoints.save(3, **to_trees(state(where, 3)))
    assert checkpoints.latest() == 3
    checkpoints.close()
    assert fingerprint(load_state(tmp_path, 3, where)) == fingerprint(state(where, 3))


def test_a_step_before_the_newest_is_saved_after_it_or_elsewhere(tmp_path):
    where = definition()
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    checkpoints.save(3, **to_trees(state(where, 3)))
    with pytest.raises(UserError, match="step 2 is not saved, since step 3 is there") as error:
        checkpoints.save(2, **to_trees(state(where, 2)))
    assert str(error.value).endswith("; go on from that, or choose another folder")
    checkpoints.save(4, **to_trees(state(where, 4)))
    checkpoints.close()
    assert latest_step(tmp_path / "run") == 4
    save(tmp_path / "other", {2: state(where, 2)})
    assert latest_step(tmp_path / "other") == 2


def test_saving_goes_on_while_the_state_is_donated(tmp_path):
    where = definition(fsdp=8)
    first = state(where, 1)
    digest = fingerprint(first)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, **to_trees(first))
    clear = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    jax.block_until_ready(clear(first))
    checkpoints.close()
    assert fingerprint(load_state(tmp_path, 1, where)) == digest


@pytest.fixture
def collected():
    """Collects, unheard, what Orbax leaves to the garbage collector when reading fails.

    A later test would else fail by it.
    """
    yield
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.collect()
    sys.unraisablehook = hook


def unclosed(test):
    """Marks a test after which Orbax leaves something open."""
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.usefixtures("collected")(ignored(test))


def one_line(run, step, config=CONFIG):
    with pytest.raises(UserError) as error:
        load_state(run, step, definition(config))
    said = str(error.value)
    del error
    gc.collect()
    assert "\n" not in said
    return said


def test_a_missing_step_is_an_error_that_lists_those_there_are(run):
    assert "no step 5; there are: 4, 6" in one_line(run, 5)


def test_a_run_without_checkpoints_is_an_error(tmp_path):
    assert "no step 1; there are: none" in one_line(tmp_path, 1)


@unclosed
@pytest.mark.parametrize("gone", ["trainable", "rest"])
def test_a_broken_checkpoint_is_an_error(run, tmp_path, gone):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoints" / "6" / gone)
    said = one_line(broken, 6)
    assert "checkpoints/6: not readable" in said
    shutil.rmtree(re.search(r"; delete (\S+): step 4 is before it$", said)[1])
    assert latest_step(broken) == 4
    load_state(broken, 4, definition())


@unclosed
@pytest.mark.parametrize(
    "changes",
    [{"ffn_dim": 96}, {"num_layers": 3}, {"tie_embeddings": True}, {"qk_norm": True}],
    ids=str,
)
def test_another_model_is_an_error_that_names_the_place(run, changes):
    assert "checkpoints/6" in one_line(run, 6, recipes.in_memory(**changes))


def full_disk(monkeypatch, text="No space left on device"):
    """Orbax's thread meets it, and `save` has returned by then."""

    def fail(*_):
        raise ValueError(f"RESOURCE_EXHAUSTED: {text}\n[tensorstore]")

    monkeypatch.setattr(ocp.CheckpointManager, "_finalize", fail)


@unclosed
def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    full_disk(monkeypatch)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, **to_trees(state(definition(), 1)))
    with pytest.raises(StorageError, match=r"checkpoints: not written: .*No space left") as error:
        checkpoints.wait()
    assert "\n" not in str(error.value)


@unclosed
@pytest.mark.parametrize("what", ["local", "copy"])
def test_a_checkpoint_that_cannot_go_to_its_url_is_an_error(tmp_path, monkeypatch, what):
    # The staging of s3://, with a folder in the URL's place.
    monkeypatch.setattr(staging, "needed", lambda folder: True)
    if what == "local":
        full_disk(monkeypatch)
    else:
        monkeypatch.setattr(staging.storage, "transfer", lambda *_: 1 / 0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, **to_trees(state(definition(), 1)))
    said = "No space left" if what == "local" else "division by zero"
    with pytest.raises(StorageError, match=f"checkpoints/1: not written: .*{said}"):
        checkpoints.save(2, **to_trees(state(definition(), 2)))
    assert latest_step(tmp_path) is None


def test_parameters_load_alone(run):
    placement = Placement(make_mesh(MeshConfig(fsdp=4, tensor=2)), CONFIG.sharding)
    placed = llama.placed_shapes(CONFIG.model, placement, "float32", "float32")
    params = load_params(run, 6, placed)
    jax.tree.map(np.testing.assert_array_equal, params, state(definition(), 6).trainable)
