"""Real processes of one run on this machine: started, watched, and never left behind."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATIENCE = 600  # seconds, on a machine that is busy with other things

SRUN = f"""#!{sys.executable}
# Starts SLURM_NTASKS tasks here as srun would, each with its own HOME, as nodes with local disks.
import os, subprocess, sys, time
count, command = int(os.environ["SLURM_NTASKS"]), sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
step = dict(os.environ, SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_TASKS=str(count))
def task(i):
    home = os.path.join(os.environ["HOME"], str(i))
    os.makedirs(home, exist_ok=True)
    number = dict(SLURM_PROCID=str(i), SLURM_LOCALID=str(i), HOME=home)
    return subprocess.Popen(command, env=step | number)
tasks = [task(i) for i in range(count)]
while any(t.poll() is None for t in tasks):
    if any(t.poll() for t in tasks):
        [t.kill() for t in tasks]
    time.sleep(0.05)
sys.exit(max(t.returncode % 256 for t in tasks))
"""


def executable(path: Path, text: str) -> Path:
    """Writes a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def free_port(lowest: int = 20000) -> int:
    """A port from `lowest` on that nobody listens to, other ones in other test processes."""
    for port in range(lowest + os.getpid() % 2000, 65536):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return port
    raise OSError("no free port")


def environment(devices: int, **more: str) -> dict[str, str]:
    """This process's, for one with `devices` CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {os.environ.get('XLA_FLAGS', '')}"
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path} | more


class Process:
    """A program whose output goes to files, so that nobody has to read it for it to go on."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path):
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=err, start_new_session=True
            )

    @property
    def out(self) -> str:
        """What was printed, without gloo's own lines."""
        lines = self._out.read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[Gloo]"))

    @property
    def err(self) -> str:
        return self._err.read_text()

    def until_step(self, step: int) -> None:
        """Waits until a step, or a later one, is reported."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            seen = [x.split()[1] for x in self.err.splitlines() if x.startswith("step ")]
            if seen and int(seen[-1]) >= step:
                return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        pytest.fail(f"did not come to step {step}: {self.err}")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def status(self, timeout: float = PATIENCE) -> int:
        """Waits for the exit status."""
        return self._process.wait(timeout)

    def end(self) -> None:
        """Kills it and what it started, if anything is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def started(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], logs: Path
) -> Iterator[list[Process]]:
    """The commands, running; all are gone when this ends."""
    logs.mkdir(parents=True, exist_ok=True)
    processes = []
    try:
        for i, (command, env) in enumerate(zip(commands, environments, strict=True)):
            processes.append(Process(command, env, logs / str(i)))
        yield processes
    finally:
        for process in processes:
            process.end()


def by_hand(count: int, *program: str) -> list[list[str]]:
    """The commands of `count` processes with the coordinator given."""
    port = free_port()
    return [
        [
            sys.executable, *program, f"--distributed.coordinator=127.0.0.1:{port}",
            f"--distributed.num_processes={count}", f"--distributed.process_id={i}",
        ]
        for i in range(count)
    ]  # fmt: skip
