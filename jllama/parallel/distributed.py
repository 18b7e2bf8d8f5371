"""Several processes as one run: how they find each other, agree, and leave together.

Process 0 leads: it prepares, writes and prints. The others compute. What all must know alike (bad
input on one host, a signal to one of them) they tell each other; what nobody can tell (a process
that died) shows as a broken collective or a missing heartbeat.
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
from jllama.errors import UserError

LOST = 3  # exit status of a process that lost another one, or waited for it in vain

_WEEK = 7 * 24 * 3600
_TOLD = 2000  # bytes of a text that processes tell each other
_meetings = itertools.count()
_T = TypeVar("_T")


class SharedError(UserError):
    """A `UserError` that every process raises at the same place: all can leave in good order."""

    def __init__(self, message: str, status: int = UserError.status):
        super().__init__(message)
        self.status = status


def start(config: DistributedConfig) -> None:
    """Joins the run's processes; call it before anything that asks JAX for devices.

    Does nothing when this is a single process, or when it has joined already. Raises `UserError`
    for numbers that cannot be, and ends the process with status `LOST` when the others do not come
    up within `start_seconds`.
    """
    if jax.distributed.is_initialized():
        return
    if config.coordinator:
        found = _by_hand(config)
    elif (config.num_processes, config.process_id) != (0, -1):
        raise UserError("distributed: num_processes and process_id need distributed.coordinator")
    elif config.detect and (cluster := detect(os.environ)):
        # JAX has no name for Kubernetes: it is what is left when nothing else is there.
        found = {"cluster_detection_method": None if cluster == "k8s" else cluster}
    else:
        return
    # Its handler would swallow a SIGTERM before training; during training there is `Vote`.
    jax.config.update("jax_enable_preemption_service", False)
    # In vain JAX waits until it aborts the process with a stack trace; this is a line earlier.
    watch = threading.Timer(config.start_seconds, _not_all_came, [config])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            **found,
            initialization_timeout=config.start_seconds + 60,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            # The leader may still be writing a sample; a death is the heartbeat's business.
            shutdown_timeout_seconds=_WEEK,
        )
    except Exception as e:  # what JAX, gRPC and the cluster's own interface raise
        raise UserError(
            f"distributed: {_brief(e)}; check the cluster, give distributed.coordinator,"
            " num_processes and process_id, or set distributed.detect=false for a single process"
        ) from e
    finally:
        watch.cancel()


def _by_hand(config: DistributedConfig) -> dict[str, Any]:
    host, _, port = config.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"distributed.coordinator={config.coordinator}: must be HOST:PORT")
    if config.num_processes < 1:
        raise UserError("distributed.num_processes: say how many processes the run has in all")
    if not 0 <= config.process_id < config.num_processes:
        raise UserError(
            f"distributed.process_id={config.process_id}: must be from 0 to"
            f" {config.num_processes - 1}, another one in each process"
        )
    return {
        "coordinator_address": config.coordinator,
        "num_processes": config.num_processes,
        "process_id": config.process_id,
        "cluster_detection_method": "deactivate",  # every process takes all devices that it sees
    }


def detect(environ: Mapping[str, str]) -> str | None:
    """The cluster in JAX's words, if this process was started as one of several; else None.

    JAX's own detection asks where it is, not whether there are others: in an interactive SLURM
    shell it would wait for processes that nobody started, or hide all GPUs but one.
    """

    def number(*names: str) -> int:
        value = next((environ[name] for name in names if name in environ), "")
        return int(value) if value.isdigit() else 1

    if number("OMPI_COMM_WORLD_SIZE") > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ:
            raise UserError(
                "distributed: this Open MPI does not say where its first process is; give"
                " distributed.coordinator=HOST:PORT, num_processes=$OMPI_COMM_WORLD_SIZE and"
                " process_id=$OMPI_COMM_WORLD_RANK"
            )
        return "ompi"
    # Set by srun for its tasks alone; salloc's shell and a batch script without srun have no step,
    # and an interactive step keeps the allocation's SLURM_NTASKS.
    step = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
    if number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") > 1 and all(x in environ for x in step):
        return "slurm"
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    if "," in hosts or (hosts and number("MEGASCALE_NUM_SLICES") > 1):
        return "gketpu"
    # Set by JAX where it finds TPU chips. Only the metadata server knows the number of workers, so
    # a single one starts as a run of one process. The CPU of such a machine is on its own.
    chips = environ.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environ
    platforms = (environ.get("JAX_PLATFORMS") or "tpu").split(",")
    if chips and not hosts and "tpu" in platforms:
        return "gcetpu"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "distributed: this is one pod of an indexed Job, and the package kubernetes that"
                " would find the others is not installed: pip install 'jax[k8s]', or give"
                " distributed.coordinator; distributed.detect=false if it is the only one"
            )
        return "k8s"
    return None


def _not_all_came(config: DistributedConfig) -> None:
    where = f" at {config.coordinator}" if config.coordinator else ""
    _leave(
        LOST,
        f"error: distributed: the processes did not all come up{where} within"
        f" {config.start_seconds} s; check that every one was started, that process 0 can be"
        " reached on that port, and distributed.start_seconds",
    )


def leader() -> bool:
    """Whether this process writes and prints for the run."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether the run has more than this process."""
    return jax.process_count() > 1


def meet() -> None:
    """Returns once every process is here, however long the others take."""
    # Not a collective: gloo's first one gives up after 30 s, and preparing data takes hours.
    key = f"jllama-{next(_meetings)}"
    multihost.get_barrier_sync_fn()(key=key, timeout_ms=_WEEK * 1000)


def tell(text: str) -> list[str]:
    """Every process's text, by process number; of a long one the beginning."""
    if not several():
        return [text]
    meet()
    mine = np.zeros(_TOLD, np.uint8)
    told = text.encode()[:_TOLD]
    mine[: len(told)] = np.frombuffer(told, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(mine))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def together(action: Callable[[], _T]) -> _T:
    """`action` in every process: when it is a `UserError` in one, it is a `SharedError` in all."""
    result, said = None, ""
    try:
        result = action()
    except UserError as e:
        if not several():
            raise
        said = f"{e.status} {e}"
    lines = tell(said)
    for number, line in enumerate(lines):
        if line:
            status, _, text = line.partition(" ")
            who = f"process {number} of {len(lines)}: " if len(set(lines)) > 1 else ""
            raise SharedError(f"{who}{text}", int(status))
    return result


def same(what: str, text: str, fix: str) -> None:
    """Raises `SharedError` unless `text` is the same in every process."""
    texts = tell(hashlib.sha256(text.encode()).hexdigest())
    other = next((i for i, one in enumerate(texts) if one != texts[0]), None)
    if other is not None:
        raise SharedError(
            f"{what} is not the same in process {other} of {len(texts)} as in process 0; {fix}"
        )


class Vote:
    """Whether any process says yes, known to all as a value of the devices.

    A cast is dispatched like a training step and never waits; reading a cast's result at the same
    step everywhere gives the same answer everywhere.
    """

    def __init__(self):
        size = jax.device_count()
        mesh = jax.make_mesh((size,), ("all",), axis_types=(AxisType.Auto,))
        self._spread = NamedSharding(mesh, PartitionSpec("all"))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, mine: bool) -> jax.Array | bool:
        """int32, more than 0 if any process said True."""
        if not several():
            return mine
        here = np.full(jax.local_device_count(), mine, np.int32)
        return self._any(jax.make_array_from_process_local_data(self._spread, here))


@contextlib.contextmanager
def leaving_together(advice: Callable[[], str]) -> Iterator[None]:
    """Whatever ends one process of several ends all of them, none with a success.

    A process that raises inside leaves at once with its line: the others then meet a broken
    collective or miss its heartbeat, and leave with status `LOST` and a line that ends with
    `advice()`. Nothing waits at the exit for processes that will not come. Alone, the exception
    goes its way, as a `SharedError` does.
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
            _leave(e.status, f"error: {who}: {e}")
        if isinstance(e, KeyboardInterrupt):
            _leave(130, f"{who}: interrupted")
        if is_loss(e):
            _leave(LOST, f"error: {who}: another process was lost ({_brief(e)}){_say(advice)}")
        _leave(1, f"{traceback.format_exc()}error: {who}: ended by the above{_say(advice)}")


def is_loss(error: BaseException) -> bool:
    """Whether a process that died explains the error: a collective or barrier that broke."""
    # Gloo's arrive as ValueError or JaxRuntimeError, according to where they are noticed; Orbax has
    # its own RuntimeErrors for a barrier.
    if not several() or not isinstance(error, RuntimeError | ValueError | TimeoutError):
        return False
    return _sounds_lost(str(error))


# Not single words: a message of XLA may quote a program's `opt-barrier`, one of a store a 503.
_LOSS = re.compile(
    r"gloo|nccl (error|operation)|coordination[ _]?(service|agent)|heartbeat"
    r"|barrier (has )?(timed|failed|error|aborted)|connection (closed|reset) by peer",
    re.IGNORECASE,
)
_NO_LOSS = re.compile(
    r"RESOURCE_EXHAUSTED|tensorstore|\b(gs|s3)://|storage\.googleapis", re.IGNORECASE
)


def _sounds_lost(message: str) -> bool:
    return _LOSS.search(message) is not None and _NO_LOSS.search(message) is None


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _say(advice: Callable[[], str]) -> str:
    try:
        return f"; {advice()}"
    except Exception:  # the storage may be what failed; this line is written even so
        return ""


def _leave(status: int, line: str) -> NoReturn:
    """Ends the process without its exit handlers, which would wait for the other processes."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        os.write(2, f"{line}\n".encode())  # no lock, which another thread may hold
    os._exit(status)
