"""The launch scripts with programs in the place of gcloud, srun, sh's python: what they start.

The SLURM script starts a real run in train/test_hosts.py. No test here needs a cluster; what that
leaves open is in docs/launch.md.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hosts
import pytest
import yaml

from jllama.config import DistributedConfig
from jllama.config import recipe as configs
from jllama.errors import StorageError, UserError
from jllama.parallel import distributed

SCRIPTS = sorted((hosts.ROOT / "launch").iterdir())
STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
TPU = {"TPU_ML_PLATFORM": "JAX"}  # set by JAX where there are chips
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
OMPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}


@pytest.mark.parametrize(
    ("environ", "cluster"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"} | OMPI, "ompi"),
        ({"OMPI_COMM_WORLD_SIZE": "1"} | OMPI, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"} | STEP, "slurm"),
        ({"SLURM_NTASKS": "2"} | STEP, "slurm"),
        # salloc's shell or a batch script without srun; srun --pty; salloc's interactive step.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"} | STEP, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"} | STEP, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"} | TPU | POD, "gketpu"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"} | TPU, "gketpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"} | TPU, None),
        (TPU, "gcetpu"),
        (TPU | {"JAX_PLATFORMS": "tpu,cpu"}, "gcetpu"),
        (TPU | {"JAX_PLATFORMS": "cpu"}, None),
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, None),
        (POD, None),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else None,
)
def test_a_cluster_is_one_only_with_other_processes(environ, cluster):
    assert distributed.detect(environ) == cluster


def test_a_pod_of_an_indexed_job_needs_the_package_that_finds_the_others(monkeypatch):
    pod = POD | {"JOB_COMPLETION_INDEX": "0"}
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[k8s\]'"):
        distributed.detect(pod)
    for name, value in pod.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"distributed\.detect=false if there is no other pod"):
        distributed.start(DistributedConfig())
    assert distributed.start(DistributedConfig(detect=False)) is None
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    assert distributed.detect(pod) == "k8s"


def test_an_open_mpi_that_hides_its_first_process_is_told_where_it_is(monkeypatch):
    environ = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    with pytest.raises(UserError, match=r"process_id=\$OMPI_COMM_WORLD_RANK") as error:
        distributed.detect(environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    given = []
    monkeypatch.setattr(
        distributed.jax.distributed, "initialize", lambda **keys: given.append(keys)
    )
    keys = re.findall(r"(\w+)=(\$\w+|HOST:PORT)", str(error.value))
    values = {key: os.path.expandvars(value) for key, value in keys}
    numbers = {key: int(values[key]) for key in ("num_processes", "process_id")}
    distributed.start(DistributedConfig(coordinator="host:1234", **numbers))
    assert values["coordinator"] == "HOST:PORT"
    assert (given[0]["num_processes"], given[0]["process_id"]) == (4, 3)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"coordinator": "here"}, "must be HOST:PORT"),
        ({"coordinator": "here:1"}, "num_processes"),
        ({"coordinator": "here:1", "num_processes": 2}, "process_id=-1: must be from 0 to 1"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "must be from 0 to 1"),
        ({"num_processes": 2, "process_id": 0}, "need distributed.coordinator"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_one_line(keys, said):
    with pytest.raises(UserError) as error:
        distributed.start(DistributedConfig(**keys))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (True, "FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer"),
        (True, "INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"),
        (True, "DEADLINE_EXCEEDED: Barrier timed out. Id: jllama-3"),
        (True, "INTERNAL: Shutdown barrier has failed."),
        (True, "UNAVAILABLE: 1 task stopped sending heartbeats"),
        (True, "UNAVAILABLE: Socket closed\nRPC: /tensorflow.CoordinationService/Barrier"),
        (True, "INTERNAL: Barrier failed because: Task 1 heartbeat timeout. RPC: /x"
               " [type.googleapis.com/tensorflow.CoordinationServiceError='']"),
        (True, "UNAVAILABLE: recvmsg: Connection reset by peer; see https://openxla.org/x"),
        (False, "RESOURCE_EXHAUSTED: Out of memory while running %opt-barrier.1, %nccl error"),
        (False, "INVALID_ARGUMENT: %opt-barrier.3 has another shape"),
        (False, "UNAVAILABLE: Error writing \"gs://bucket/x\": 503 connection reset by peer"),
        (False, "DEADLINE_EXCEEDED: timeout [source locations='tensorstore/kvstore/gcs.cc']"),
    ],
)  # fmt: skip
def test_only_the_words_of_a_broken_collective_mean_a_lost_process(monkeypatch, lost, message):
    monkeypatch.setattr(distributed, "several", lambda: True)
    assert distributed.is_loss(ValueError(message)) == lost
    assert not distributed.is_loss(OSError(message))


@pytest.mark.parametrize("error", [UserError("wrong"), StorageError("away")], ids=repr)
def test_a_process_of_several_leaves_with_the_errors_status(monkeypatch, error):
    def leave(status, line):
        raise SystemExit((status, line))

    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(distributed, "_exit", leave)
    with pytest.raises(SystemExit) as left, distributed.ending_together(lambda: ""):
        raise error
    assert left.value.code == (error.status, f"error: process 0 of 1: {error}")


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("error", [UserError("wrong"), StorageError("away")], ids=repr)
def test_an_error_in_one_process_has_its_status_in_all(monkeypatch, error, alike):
    def fail():
        raise error

    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(distributed, "_gather_texts", lambda text: [text if alike else "", text])
    with pytest.raises(distributed.SharedError) as shared:
        distributed.together(fail)
    assert shared.value.status == error.status
    assert str(shared.value) == (str(error) if alike else f"process 1 of 2: {error}")


def run(tmp_path, command, programs, **env):
    """Runs a launch script with `programs` found first: (status, stdout, stderr)."""
    for name, text in programs.items():
        hosts.executable(tmp_path / "bin" / name, text)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=hosts.ROOT, env=os.environ | {"PATH": path} | env,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


# Says what it was called with, and leaves with STATUS.
ECHO = '#!/bin/sh\nfor a in "$@"; do echo "<$a>"; done\nexit ${STATUS:-0}\n'
# Runs --command as the hosts' shell would, after a line of its other arguments.
GCLOUD = """#!/bin/bash
echo "gcloud ${*/#--command=*/}"
for a in "$@"; do case "$a" in --command=*) bash -c "${a#--command=}";; esac; done
"""
PASSED = ["--config", "a recipe.yaml", "--run.name=x y", "--sample.prompt=it's $HOME"]


@pytest.mark.parametrize("status", [0, 134])
@pytest.mark.parametrize("script", ["tpu_pod.sh", "tpu_multislice.sh", "slurm.sbatch"])
def test_a_script_passes_arguments_and_status_through(tmp_path, script, status):
    host = tmp_path / "a checkout"
    hosts.executable(host / ".venv" / "bin" / "python", ECHO)
    programs = {"gcloud": GCLOUD, "srun": f'#!/bin/sh\necho "srun $1 $2"\nshift 2\n{"exec "}"$@"\n'}
    got, out, err = run(
        tmp_path, ["bash", f"launch/{script}", *PASSED], programs, STATUS=str(status),
        TPU="pod", QUEUED="pods", SLICES="2", ZONE="z", DIR=str(host),
        SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(host), PYTHON="",
    )  # fmt: skip
    first, *args = out.splitlines()
    slices = ["--mesh.replica=2"] if script == "tpu_multislice.sh" else []
    assert args == [f"<{a}>" for a in ["train.py", *slices, *PASSED]]
    assert {
        "tpu_pod.sh": "gcloud compute tpus tpu-vm ssh pod --zone=z --worker=all",
        "tpu_multislice.sh": "gcloud compute tpus queued-resources ssh pods --zone=z --node=all",
        "slurm.sbatch": "srun --kill-on-bad-exit=1 --label",
    }[script] in first
    assert got == status
    lines = err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert len(lines) == (0 if status == 0 else 1 if script == "slurm.sbatch" else 2)


def test_a_job_that_a_signal_stopped_is_no_error(tmp_path):
    srun = "#!/bin/sh\nexit 75\n"
    got, _, err = run(tmp_path, ["bash", "launch/slurm.sbatch"], {"srun": srun}, SLURM_JOB_ID="7")
    assert got == 75
    assert err == "job 7: stopped by a signal and checkpointed; the same command resumes it\n"


@pytest.mark.parametrize("script", ["tpu_pod.sh", "tpu_multislice.sh"])
def test_a_script_says_what_it_needs(tmp_path, script):
    status, out, err = run(tmp_path, ["bash", f"launch/{script}"], {"gcloud": GCLOUD})
    assert status != 0
    assert out == ""
    assert "set " in err


@pytest.fixture
def manifest():
    return list(yaml.safe_load_all((hosts.ROOT / "launch" / "kubernetes.yaml").read_text()))


def test_the_manifest_agrees_with_itself(manifest):
    service, job = manifest
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    shell, *args = container["args"]
    # Names and numbers that have to be the same in several places.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    host, port = re.search(r"coordinator=(\S+):(\d+)", shell).groups()
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert [p["containerPort"] for p in container["ports"]] == [int(port)]
    count = int(re.search(r"num_processes=(\d+)", shell)[1])
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == count
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy asks for
    moved, rule = spec["podFailurePolicy"]["rules"]
    assert moved["action"] == "Ignore"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    # Bad input ends the Job; what a store or a lost process ends is started again.
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    assert rule["onExitCodes"]["values"] == [UserError.status]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    # The recipe is one, with every key as it is spelt there.
    assert configs.from_arguments(args[1:], None).run.folder == "/shared/runs"


@pytest.mark.parametrize("status", [0, 134])
def test_a_pod_passes_arguments_and_status_through(tmp_path, manifest, status):
    container = manifest[1]["spec"]["template"]["spec"]["containers"][0]
    command = [*container["command"], container["args"][0], "train", *PASSED]
    env = {"JOB_COMPLETION_INDEX": "3", "STATUS": str(status)}
    got, out, err = run(tmp_path, command, {"python": ECHO}, **env)
    assert got == status
    assert out.splitlines()[0] == "<train.py>"
    assert "<--distributed.process_id=3>" in out.splitlines()
    assert out.splitlines()[-len(PASSED) :] == [f"<{a}>" for a in PASSED]
    assert len(err.splitlines()) == (status != 0)


def test_a_pod_that_is_told_to_end_lets_its_process_finish(tmp_path, manifest):
    container = manifest[1]["spec"]["template"]["spec"]["containers"][0]
    slow = "#!/bin/sh\ntrap 'sleep 0.3; echo checkpointed; exit 75' TERM\necho up\n"
    slow += "while :; do sleep 0.05; done\n"
    python = hosts.executable(tmp_path / "bin" / "python", slow)
    env = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    env["JOB_COMPLETION_INDEX"] = "0"
    with hosts.started([[*container["command"], *container["args"]]], [env], tmp_path) as (shell,):
        end = time.monotonic() + 60
        while "up" not in shell.out and time.monotonic() < end:
            time.sleep(0.02)
        shell.send(signal.SIGTERM)
        assert shell.status(60) == 75
        assert shell.out == "up\ncheckpointed\n"


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(tmp_path, manifest):
    snippet = tmp_path / "pod.sh"
    container = manifest[1]["spec"]["template"]["spec"]["containers"][0]
    snippet.write_text(f"#!/bin/sh\n{container['args'][0]}")
    scripts = [str(p) for p in SCRIPTS if p.suffix in (".sh", ".sbatch")]
    done = subprocess.run(
        [SHELLCHECK, *scripts, str(snippet)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
