"""One run by several real processes: they train as one process does, or they all end.

They talk over loopback with gloo, and are started as srun would start them, or by hand.
"""

import functools
import json
import os
import re
import shutil
import signal
import sys
import time

import hosts
import jax
import numpy as np
import pytest
import recipes
import tiny
import yaml

import jllama
from jllama.config import MeshConfig
from jllama.config import recipe as configs
from jllama.interop import hf
from jllama.parallel.distributed import LOST
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.store import checkpoint
from jllama.store.find import latest_step
from jllama.store.fingerprint import fingerprint
from jllama.train import loop
from jllama.train import run as run_module
from jllama.train.metrics import read
from jllama.train.placement import make_placement
from jllama.train.state import define_state, init_state, load_state, to_trees

STEPS = 24


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = recipes.on_disk(tmp_path_factory.mktemp("text"), num_layers=1)
    data = yaml.safe_load(path.read_text())
    data["training"] |= {"steps": STEPS}
    data["checkpoint"] = {"every": 8}
    data["eval"] |= {"every": 0}
    data["sample"] = {"prompt": "def ", "max_new_tokens": 6}
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run of two processes under the SLURM script: its folder, the script, the homes' folder."""
    folder = tmp_path_factory.mktemp("slurm")
    hosts.executable(folder / "bin" / "srun", hosts.SRUN)
    lowest = 65535 - 2**12 + 1  # under SLURM, JAX adds the job's number to this for its port
    job = {
        "SLURM_JOB_ID": str(hosts.free_port(lowest) - lowest),
        "SLURM_NTASKS": "2",
        "SLURM_SUBMIT_DIR": str(hosts.ROOT),
        "PYTHON": sys.executable,
        "HOME": str(folder),
    }
    env = hosts.environment(1, **job)
    env["PATH"] = f"{folder / 'bin'}:{env['PATH']}"
    command = [
        "bash", "launch/slurm.sbatch", "--config", str(recipe), "--run.name=whole",
        "--data.prepare.folder=~/prepared",
    ]  # fmt: skip
    with hosts.started([command], [env], folder / "logs") as (script,):
        assert script.status() == 0, script.err
    return recipe.parent / "runs" / "whole", script, folder


def one_process(recipe, *overrides, devices=2):
    """Trains the run, or resumes it, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        some = functools.partial(make_placement, devices=jax.devices()[:devices])
        patch.setattr(run_module, "make_placement", some)
        patch.setattr(run_module, "peak_flops", lambda dtype: (1e12, "published"))
        return loop.train(configs.load(recipe, list(overrides)))


def run(recipe, name, count, *overrides, devices=1):
    """Starts `count` processes of a run, with `devices` devices each; a context."""
    commands = hosts.by_hand(
        count, "train.py", "--config", str(recipe), f"--run.name={name}",
        "--distributed.heartbeat_seconds=20", "--sample.max_new_tokens=0", *overrides,
    )  # fmt: skip
    environments = [hosts.environment(devices)] * count
    return hosts.started(commands, environments, recipe.parent / "logs" / name)


def losses(folder):
    lines = [x for x in read(folder / "metrics.jsonl") if "loss" in x]
    return [(x["step"], x["loss"], x["grad_norm"]) for x in lines]


def digest(folder):
    config = configs.load(folder / "config.yaml")
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), config.sharding)
    return fingerprint(load_state(folder, STEPS, define_state(config, placement)))


def test_two_processes_train_as_one_does(recipe, whole, tmp_path):
    alone = one_process(recipe, f"run.folder={tmp_path}")
    # The same program on the same number of devices, but gloo adds in another order.
    np.testing.assert_allclose(losses(whole[0]), losses(alone.folder), rtol=1e-4)
    summary = json.loads((whole[0] / "summary.json").read_text())
    assert summary["eval"] == pytest.approx(alone.eval, rel=1e-4)
    assert summary["tokens"] == alone.tokens


def test_each_process_reads_its_own_shards_of_a_hugging_face_model(recipe, tmp_path):
    model = configs.load(recipe).model
    params = tiny.params(model)
    hf.write_folder(tmp_path / "model", model, params, None)
    begin = [
        f"--training.init_from={tmp_path / 'model'}", "--run.stop_after=1", "--mesh.tensor=2",
        "--training.schedule.peak=1e-30", "--training.schedule.warmup_steps=0",
    ]  # fmt: skip
    with run(recipe, "begun", 2, *begin, devices=2) as processes:
        assert [process.status() for process in processes] == [0, 0], processes[0].err
    loaded = jllama.load(recipe.parent / "runs" / "begun")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_processes_quantise_a_base_and_adapt_it_as_one_does(recipe, whole, tmp_path):
    adapt = [
        f"training.init_from={whole[0]}", "run.stop_after=2",
        "adapt={kind: lora, rank: 4, alpha: 8, quantize: int8}",
    ]  # fmt: skip
    with run(recipe, "adapted", 2, *(f"--{key}" for key in adapt)) as processes:
        assert [process.status() for process in processes] == [0, 0], processes[0].err
    alone = one_process(recipe, *adapt, f"run.folder={tmp_path}")
    there = losses(recipe.parent / "runs" / "adapted")
    np.testing.assert_allclose(there, losses(alone.folder), rtol=1e-4)


def test_only_process_0_writes_and_prints(whole):
    folder, script, _ = whole
    assert [step for step, *_ in losses(folder)] == list(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        assert script.err.count(f"step {step}  loss") == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert len(re.findall(r"^bits_per_byte", script.out, re.MULTILINE)) == 1
    assert script.out.endswith(summary["sample"].removeprefix("def ") + "\n")
    assert len(list((folder / "tensorboard").iterdir())) == 1


def test_hosts_without_shared_storage_prepare_their_own_data(whole):
    first, second = (list((whole[2] / home / "prepared").glob("train-*")) for home in "01")
    assert [p.name for p in first] == [p.name for p in second] != []


def test_a_killed_worker_ends_the_run_and_the_same_command_resumes_bit_for_bit(recipe, whole):
    # One device each: gloo's ranks within one process do not notice that another rank gave up.
    with run(recipe, "killed", 2) as (leader, worker):
        leader.until_step(11)
        worker.send(signal.SIGKILL)
        assert leader.status() == LOST, leader.err
    last = leader.err.splitlines()[-1]
    assert re.fullmatch(
        r"error: process 0 of 2: another process was lost \(.*\);"
        r" the same command (resumes from step 8|starts anew)",
        last,
    ), leader.err
    assert "Traceback" not in leader.err
    folder = recipe.parent / "runs" / "killed"
    assert len(losses(folder)) < STEPS
    with run(recipe, "killed", 2) as processes:
        assert [p.status() for p in processes] == [0, 0], processes[0].err
    assert losses(folder) == losses(whole[0])
    assert digest(folder) == digest(whole[0])
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["16", str(STEPS)]


def test_a_signal_to_one_process_stops_all_and_other_numbers_of_them_resume(recipe, whole):
    folder = recipe.parent / "runs" / "stopped"
    with run(recipe, "stopped", 2, devices=2) as (leader, worker):
        leader.until_step(4)
        worker.send(signal.SIGTERM)
        assert [leader.status(), worker.status()] == [os.EX_TEMPFAIL] * 2, leader.err
    said = rf"a signal to another process: stopped at step (\d+) of {STEPS}, checkpointed"
    stopped = re.fullmatch(said, leader.err.splitlines()[-1])
    assert stopped, leader.err
    assert latest_step(folder) == int(stopped[1])
    assert worker.err == ""

    # Four processes, of which two each hold the same rows, and whose coordinator falls silent.
    with run(recipe, "stopped", 4, "--mesh.tensor=2") as (leader, *workers):
        leader.until_step(int(stopped[1]) + 3)
        assert f"resumed at step {stopped[1]} of {STEPS}" in leader.err
        leader.send(signal.SIGSTOP)
        silent = time.monotonic()
        assert all(worker.status() != 0 for worker in workers)
        assert time.monotonic() - silent < 70  # seconds; JAX's default is 100

    result = one_process(recipe, "run.name=stopped", "sample.max_new_tokens=0", devices=1)
    assert result.done
    np.testing.assert_allclose(losses(folder), losses(whole[0]), rtol=1e-3)


def test_bad_input_on_one_host_ends_all_processes_with_the_same_error(recipe, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "train.txt").write_text((recipe.parent / "train.txt").read_text())
    commands = hosts.by_hand(
        2, "train.py", "--config", str(recipe), f"--run.folder={tmp_path}",
        "--data.prepare.folder=~/prepared", "--data.train.0.source.files=[~/train.txt]",
    )  # fmt: skip
    homes = [hosts.environment(1, HOME=str(tmp_path / str(i))) for i in range(2)]
    with hosts.started(commands, homes, tmp_path / "logs") as processes:
        assert [p.status() for p in processes] == [2, 2]
    for process in processes:
        line = process.err.splitlines()[-1]
        assert re.match(
            r"error: process 1 of 2: data\.train\.0\.source\.files: ~/train.txt: no file matches",
            line,
        ), line
        assert "Traceback" not in process.err


def test_an_option_that_xla_refuses_ends_all_processes_before_a_folder_is_made(recipe, tmp_path):
    given = ["--config", str(recipe), f"--run.folder={tmp_path}", "--compute.xla.cpu.xla_gone=1"]
    commands = hosts.by_hand(2, "train.py", *given)
    with hosts.started(commands, [hosts.environment(1)] * 2, tmp_path / "logs") as processes:
        assert [p.status() for p in processes] == [2, 2]
    for process in processes:
        line = process.err.splitlines()[-1]
        assert re.search(r"compute\.xla\.cpu: No such compile option: 'xla_gone'", line), line
        assert "Traceback" not in process.err
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}


def test_hosts_that_do_not_share_a_folder_or_a_recipe_are_told_so(recipe, tmp_path):
    folder, logs = tmp_path / "0" / "runs" / "name", tmp_path / "logs"
    given = [
        "--config", str(recipe), "--run.name=name", "--run.stop_after=2",
        "--sample.max_new_tokens=0",
    ]  # fmt: skip

    def ends(homes, *own):
        """The last line of two processes that fail, with a home each and `own` for the second."""
        commands = hosts.by_hand(2, "train.py", *given, "--run.folder=~/runs")
        commands[1] += own
        environments = [hosts.environment(1, HOME=str(tmp_path / home)) for home in homes]
        with hosts.started(commands, environments, logs) as processes:
            statuses = [process.status() for process in processes]
        assert statuses == [2, 2], processes[0].err
        return processes[0].err.splitlines()[-1]

    line = ends("01", "--run.seed=1")
    assert line == (
        "error: the recipe is not the same in process 1 of 2 as in process 0; start all with the"
        " same arguments"
    )
    line = ends("01")
    other = tmp_path / "1" / "runs" / "name"
    assert line.startswith(f"error: process 1 of 2: {other}: process 0 wrote this folder")
    assert line.endswith("run.folder must be on storage that all processes share")
    # What process 1 has is older.
    shutil.copytree(folder, other)
    one_process(recipe, "run.name=name", f"run.folder={folder.parent}", "run.stop_after=1")
    line = ends("01")
    assert line == (
        "error: the newest checkpoint is not the same in process 1 of 2 as in process 0;"
        " run.folder must be shared storage"
    )


def test_processes_that_never_start_are_a_one_line_error(tmp_path, recipe):
    commands = hosts.by_hand(
        2, "train.py", "--config", str(recipe), "--distributed.start_seconds=1"
    )[1:]
    with hosts.started(commands, [hosts.environment(1)], tmp_path) as (process,):
        assert process.status() == LOST
    assert re.fullmatch(
        r"error: distributed: the processes did not all connect at 127.0.0.1:\d+ within 1 s; .*\n",
        process.err,
    ), process.err


@pytest.fixture(scope="module")
def seen(recipe, tmp_path_factory):
    """What host_program.py printed in each of two processes, and the saved state's fingerprint."""
    folder = tmp_path_factory.mktemp("seen")
    config = configs.load(recipe, [f"run.folder={folder}"])
    whole_leaves = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), config.sharding)
    state = init_state(define_state(config, whole_leaves), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint, "_CHUNK_BYTES", 4096
        )  # so that a host needs some of a leaf's chunks
        checkpoints = checkpoint.Checkpoints(folder, 1)
        checkpoints.save(0, **to_trees(state))
        checkpoints.close()
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    port = hosts.free_port()
    commands = [
        [sys.executable, "tests/host_program.py", str(port), str(i), str(folder)] for i in range(2)
    ]
    with hosts.started(commands, [hosts.environment(2)] * 2, folder / "logs") as processes:
        assert [p.status() for p in processes] == [0, 0], processes[0].err + processes[1].err
    return [json.loads(p.out) for p in processes], fingerprint(state)


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [
        ("fsdp=4", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (
            "fsdp=2,context=2",
            [[0, 1, 4, 5], [2, 3, 6, 7]],
        ),  # its rule spreads rows by context first
        ("tensor=4", [[0, 1, 2, 3, 4, 5, 6, 7]] * 2),
    ],
)
def test_a_process_reads_only_the_rows_of_its_devices(seen, mesh, rows):
    for process, own in zip(seen[0], rows, strict=True):
        found = process["rows"][mesh]
        assert found["read"] == own
        assert found["evaluated"] == [i for i in own if i < 6]
        assert found["whole"] == list(range(8))


def test_each_process_restores_only_its_shards_of_what_one_device_saved(seen):
    found, saved = seen
    for process in found:
        assert process["fingerprint"] == saved
        # A process holds half of the parameters. It may read more: TensorStore joins reads of
        # neighbouring chunks, and in files this small that can be nearly all of them.
        assert process["held"] < 0.55 * process["bytes"]
        assert 0 < process["read"] <= process["on_disk"]
