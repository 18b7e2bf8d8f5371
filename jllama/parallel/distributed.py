"""Several processes as one run: how they find each other, agree, and end together.

Process 0 leads: it prepares, writes and prints. The others compute. The processes tell each other
what all of them must know: bad input on one host, or a signal to one process. A process that died
cannot tell; the others notice a broken collective or a missing heartbeat.
"""

import contextlib
import hashlib
import importlib.util
import itertools
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from jllama.config import DistributedConfig
from jllama.errors import Stopped, UserError
from jllama.files.storage import one_line

LOST = 3  # exit status of a process that lost another process, or waited for one in vain

_WEEK = 7 * 24 * 3600
_TEXT_BYTES = 2000  # processes exchange no more of a text than this
_barriers = itertools.count()
_T = TypeVar("_T")


class SharedError(UserError):
    """A `UserError` that every process raises at the same place, so that all end in good order."""

    def __init__(self, message: str, status: int = UserError.status):
        super().__init__(message)
        self.status = status


def start(config: DistributedConfig) -> None:
    """Connects the processes of the run; call it before anything that asks JAX for devices.

    Does nothing if this is a single process, or has connected already. Raises `UserError` for an
    impossible config, and ends the process with status `LOST` if the others do not start within
    `start_seconds`.
    """
    if jax.distributed.is_initialized():
        return
    if config.coordinator:
        arguments = _explicit(config)
    elif (config.num_processes, config.process_id) != (0, -1):
        raise UserError("distributed: num_processes and process_id need distributed.coordinator")
    elif config.detect and (cluster := detect(os.environ)):
        # JAX has no name for Kubernetes: it tries it last, after all other clusters.
        arguments = {"cluster_detection_method": None if cluster == "k8s" else cluster}
    else:
        return
    # The service's handler would swallow a SIGTERM before training; during training `Vote` acts.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own time limit aborts the process with a stack trace; this timer prints a line first.
    watch = threading.Timer(config.start_seconds, _not_all_started, [config])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=config.start_seconds + 60,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            # The leader may still be writing a sample; the heartbeat notices a process that died.
            shutdown_timeout_seconds=_WEEK,
        )
    except Exception as e:  # JAX, gRPC and the cluster's own interface raise errors of many types
        raise UserError(
            f"distributed: {one_line(e)}; check the cluster, give distributed.coordinator,"
            " num_processes and process_id, or set distributed.detect=false for a single process"
        ) from e
    finally:
        watch.cancel()


def _explicit(config: DistributedConfig) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize` from the config's coordinator and numbers."""
    host, _, port = config.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"distributed.coordinator={config.coordinator}: must be HOST:PORT")
    if config.num_processes < 1:
        raise UserError("distributed.num_processes: say how many processes the run has in all")
    if not 0 <= config.process_id < config.num_processes:
        raise UserError(
            f"distributed.process_id={config.process_id}: must be from 0 to"
            f" {config.num_processes - 1}, and different in each process"
        )
    return {
        "coordinator_address": config.coordinator,
        "num_processes": config.num_processes,
        "process_id": config.process_id,
        "cluster_detection_method": "deactivate",  # every process uses all devices that it sees
    }


def detect(environ: Mapping[str, str]) -> str | None:
    """JAX's name of the cluster if this process was started as one of several; else None.

    JAX's own detection finds the cluster, but not whether there are other processes: in an
    interactive SLURM shell it would wait for processes that nobody started, or hide all GPUs but
    one.
    """

    def number(*names: str) -> int:
        value = next((environ[name] for name in names if name in environ), "")
        return int(value) if value.isdigit() else 1

    if number("OMPI_COMM_WORLD_SIZE") > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ:
            raise UserError(
                "distributed: this Open MPI does not tell where its first process is; give"
                " distributed.coordinator=HOST:PORT, num_processes=$OMPI_COMM_WORLD_SIZE and"
                " process_id=$OMPI_COMM_WORLD_RANK"
            )
        return "ompi"
    # Only srun sets these, for its tasks: salloc's shell and a batch script without srun have no
    # step, and an interactive step keeps the allocation's SLURM_NTASKS.
    step = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
    if number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") > 1 and all(x in environ for x in step):
        return "slurm"
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    if "," in hosts or (hosts and number("MEGASCALE_NUM_SLICES") > 1):
        return "gketpu"
    # JAX sets this where it finds TPU chips. Only the metadata server knows the number of workers,
    # so a single worker starts as a run of one process too. On such a machine a program for the CPU
    # is a single process.
    chips = environ.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environ
    platforms = (environ.get("JAX_PLATFORMS") or "tpu").split(",")
    if chips and not hosts and "tpu" in platforms:
        return "gcetpu"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "distributed: this is a pod of an indexed Job, and the package kubernetes, which"
                " finds the other pods, is not installed: pip install 'jax[k8s]', or give"
                " distributed.coordinator; distributed.detect=false if there is no other pod"
            )
        return "k8s"
    return None


def _not_all_started(config: DistributedConfig) -> None:
    where = f" at {config.coordinator}" if config.coordinator else ""
    _exit(
        LOST,
        f"error: distributed: the processes did not all connect{where} within"
        f" {config.start_seconds} s; check that every process was started, that process 0 can be"
        " reached on that port, and distributed.start_seconds",
    )


def leader() -> bool:
    """Whether this process writes and prints for the run."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def _gather_texts(text: str) -> list[str]:
    """The texts of all processes by process number, each cut to `_TEXT_BYTES`."""
    if not several():
        return [text]
    # A barrier first, however long the others take: gloo's first collective gives up after 30 s,
    # and preparing data takes hours.
    key = f"jllama-{next(_barriers)}"
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=_WEEK * 1000)
    padded = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    rows = np.asarray(multihost_utils.process_allgather(np.frombuffer(padded, np.uint8)))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def together(action: Callable[[], _T]) -> _T:
    """Returns `action()`, run in every process; a `UserError` in one is a `SharedError` in all."""
    result, failure = None, ""
    try:
        result = action()
    except UserError as e:
        if not several():
            raise
        failure = f"{e.status} {e}"
    lines = _gather_texts(failure)
    for number, line in enumerate(lines):
        if line:
            status, _, text = line.partition(" ")
            who = f"process {number} of {len(lines)}: " if len(set(lines)) > 1 else ""
            raise SharedError(f"{who}{text}", int(status))
    return result


def check_same(what: str, text: str, fix: str) -> None:
    """Raises `SharedError` unless `text` is the same in every process."""
    digests = _gather_texts(hashlib.sha256(text.encode()).hexdigest())
    other = next((i for i, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise SharedError(
            f"{what} is not the same in process {other} of {len(digests)} as in process 0; {fix}"
        )


class Vote:
    """Tells all processes whether any of them votes yes, through an array on the devices.

    A vote is dispatched like a training step and does not block. If all processes read its result
    at the same step, all get the same answer.
    """

    def __init__(self):
        size = jax.device_count()
        mesh = jax.make_mesh((size,), ("all",), axis_types=(AxisType.Auto,))
        self._spread = NamedSharding(mesh, PartitionSpec("all"))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, mine: bool) -> jax.Array | bool:
        """An int32 scalar, above 0 if any process votes True."""
        if not several():
            return mine
        votes = np.full(jax.local_device_count(), mine, np.int32)
        return self._any(jax.make_array_from_process_local_data(self._spread, votes))


@contextlib.contextmanager
def ending_together(advice: Callable[[], str]) -> Iterator[None]:
    """Makes the end of one process of several the end of all of them, none with status 0.

    A process that raises an exception here prints one line and exits at once. The others then see
    a broken collective or a missing heartbeat, and exit with status `LOST` and a line that ends
    with `advice()`. No process waits at its exit for others that will not come. In a run of one
    process, and for a `SharedError`, the exception propagates.
    """
    try:
        yield
    except SharedError:
        raise
    except BaseException as e:
        if not several():
            raise
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(e, UserError):
            _exit(e.status, f"error: {who}: {e}")
        if isinstance(e, Stopped):
            _exit(e.status, f"{who}: {e}")
        if isinstance(e, KeyboardInterrupt):
            _exit(130, f"{who}: interrupted")
        if is_loss(e):
            _exit(LOST, f"error: {who}: another process was lost ({one_line(e)}){_text(advice)}")
        _exit(1, f"{traceback.format_exc()}error: {who}: ended by the above{_text(advice)}")


def is_loss(error: BaseException) -> bool:
    """Whether the error is a collective or barrier that broke because another process died."""
    # Gloo's errors arrive as ValueError or JaxRuntimeError, depending on where they are noticed;
    # Orbax raises a RuntimeError of its own for a barrier.
    if not several() or not isinstance(error, RuntimeError | ValueError | TimeoutError):
        return False
    return _LOSS.search(str(error)) is not None and _NO_LOSS.search(str(error)) is None


# Not single words: XLA may quote a program's `opt-barrier`, and a store may report a 503.
_LOSS = re.compile(
    r"gloo|nccl (error|operation)|coordination[ _]?(service|agent)|heartbeat"
    r"|barrier (has )?(timed|failed|error|aborted)|connection (closed|reset) by peer",
    re.IGNORECASE,
)
_NO_LOSS = re.compile(
    r"RESOURCE_EXHAUSTED|tensorstore|\b(gs|s3)://|storage\.googleapis", re.IGNORECASE
)


def _text(advice: Callable[[], str]) -> str:
    try:
        return f"; {advice()}"
    except Exception:  # the advice reads the storage, which may be what failed
        return ""


def _exit(status: int, line: str) -> NoReturn:
    """Prints a line and ends the process without its exit handlers, which wait for the others."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        os.write(2, f"{line}\n".encode())  # sys.stderr has a lock, which another thread may hold
    os._exit(status)
