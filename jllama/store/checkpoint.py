"""Checkpoints: named trees of arrays, saved while training goes on.

`RUN/checkpoints/STEP/NAME` holds one tree in Orbax's format, readable on any mesh and number of
processes. A run saves `trainable`, its parameters or its overlay, and `rest`, the step and the
optimizer's state; a model or an adapter alone has a step 0 with `trainable`.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jllama.errors import StorageError, UserError
from jllama.files import storage
from jllama.model import llama
from jllama.model.param import EachLeaf, dotted, map_leaves
from jllama.parallel.distributed import is_loss
from jllama.store import staging
from jllama.store.staging import Staging

# Orbax tells every save at INFO and WARNING, and prints the traceback of an error that it also
# raises; what a user needs to know is said here.
logging.getLogger("absl").setLevel(logging.CRITICAL)

_CHUNK_BYTES = 32 << 20
_LEAST_ROOM = 256 << 20


class Checkpoints:
    """The checkpoints of one run. Saves are asynchronous; `close` waits for them.

    Every process takes part in everything: each writes and reads the shards of its own devices.
    """

    def __init__(self, run: Path, keep: int, copies: float | None = None):
        """`copies` limits, in bytes, what waits in the host's memory to be written; see `room_for`.

        With a limit `save` takes as long as the writing, but for the last of it.
        """
        self._folder = run / "checkpoints"
        self._staging = Staging(self._folder, keep) if staging.needed(self._folder) else None
        # What a killed run had half written is removed.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        here = self._staging.local if self._staging else storage.absolute(self._folder)
        handlers, self._item = None, ocp.args.StandardSave
        if copies is not None:
            self._item = ocp.args.PyTreeSave  # the same on disk
            gb = copies / 1e9
            handlers = {
                "trainable": ocp.PyTreeCheckpointHandler(
                    save_concurrent_gb=gb,
                    save_device_host_concurrent_gb=gb,
                    use_ocdbt=False,  # its database buffers as much again
                )
            }
        self._manager = ocp.CheckpointManager(here, item_handlers=handlers, options=options)

    def latest(self) -> int | None:
        """The newest complete step."""
        if self._staging:
            return max(staging.steps(self._folder), default=None)
        return self._manager.latest_step()

    def save(self, step: int, **trees: Any) -> None:
        """Starts saving the trees by their names; returns once their arrays may be donated.

        Raises `StorageError` when this save or the one before it cannot be written.
        """
        with _writing(self._folder / str(step)):
            if self._staging:
                self._staging.wait()  # Orbax may drop the step that is being copied
            args = {name: self._item(tree, _chunks(tree)) for name, tree in trees.items()}
            self._manager.save(step, args=ocp.args.Composite(**args))
        if self._staging:
            self._staging.publish(step, self._manager.wait_until_finished)

    def restore(self, step: int, **placed: Any) -> dict[str, Any]:
        """Trees of `step` by name, straight into the places of `jax.ShapeDtypeStruct`s.

        Raises `UserError` when one cannot be read, or has another shape.
        """
        if self._staging:
            return load_trees(self._folder.parent, step, **placed)
        return _restore(self._manager, self._folder / str(step), step, **placed)

    def wait(self) -> None:
        """Returns once what was saved is on disk, or at its URL; `StorageError` if it is not."""
        with _writing(self._folder):
            if self._staging:
                self._staging.wait()
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        try:
            self.wait()
            with _writing(self._folder):
                self._manager.close()
        finally:
            if self._staging:
                self._staging.close()


@contextlib.contextmanager
def _writing(where: Path) -> Iterator[None]:
    """What Orbax meets on the storage becomes a `StorageError`; the loss of a process stays one."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # Orbax raises what its storage raises, often a save later
        if is_loss(e):
            raise
        raise StorageError(f"{where}: not written: {storage.one_line(e)}") from e


def room_for(params: Any) -> float:
    """The bytes that a copy of the largest array takes: the least to save or restore with.

    Orbax counts whole pieces, and a device's part of an array may touch them all.
    """
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return max(1.01 * largest, _LEAST_ROOM)


def _chunks(tree: Any) -> Any:
    """Stored in pieces of at most `_CHUNK_BYTES`, and not of a device's part.

    A piece is read whole: what one device saved, each of many would have to read in full.
    """
    return jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)


def _restore(
    manager: ocp.CheckpointManager,
    where: Path,
    step: int,
    asked: Callable[[Any], ocp.args.CheckpointArgs] = ocp.args.StandardRestore,
    **items: Any,
) -> Any:
    """Items of a checkpoint by name, each given as a tree of placed shapes."""
    args = {name: asked(item) for name, item in items.items()}
    try:
        restored = manager.restore(step, args=ocp.args.Composite(**args))
    except Exception as e:  # Orbax raises what its storage raises
        if is_loss(e):
            raise
        reason = storage.one_line(e)
        raise UserError(f"{where}: not readable as this model's checkpoint: {reason}") from e
    for name, item in items.items():
        for (path, want), got in zip(
            jax.tree_util.tree_leaves_with_path(item),
            jax.tree.leaves(restored[name]),
            strict=True,
        ):
            if (want.shape, want.dtype) != (got.shape, got.dtype):
                raise UserError(
                    f"{where}: {dotted(path)} is {got.shape} {got.dtype}, and the config"
                    f" makes it {want.shape} {want.dtype}"
                )
    return restored


def _part(item: Any) -> ocp.args.PyTreeRestore:
    """Asks for the leaves of `item` alone, of a stored tree that has more."""
    places = ocp.checkpoint_utils.construct_restore_args(item)
    return ocp.args.PyTreeRestore(item, restore_args=places, partial_restore=True)


def latest_step(run: Path) -> int | None:
    """The newest complete checkpoint of a run folder; None if there is none."""
    return max(_steps(run / "checkpoints"), default=None)


def load_params(
    run: Path, step: int, placed: llama.Params, each: EachLeaf | None = None
) -> llama.Params:
    """The parameters of a step in the dtypes and on the devices of `llama.placed_shapes`.

    By the processes whose devices those are. Raises `UserError` when there is no such step, it is
    incomplete, or it is another model's.

    Args:
      each: what is kept of an array; they are read one by one then.
    """
    kind = ocp.PyTreeCheckpointHandler if each else ocp.StandardCheckpointHandler
    # Orbax would hold all of it on the host as well.
    handler = kind(restore_concurrent_gb=room_for(placed) / 1e9)
    sharding = jax.tree.leaves(placed)[0].sharding
    with _open_step(run, step, sharding, trainable=handler) as (manager, where):
        if each is None:
            return _restore(manager, where, step, trainable=placed)["trainable"]

        def alone(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
            part = functools.reduce(lambda tree, key: {key: tree}, path.split(".")[::-1], leaf)
            restored = _restore(manager, where, step, _part, trainable=part)["trainable"]
            return each(path, *jax.tree.leaves(restored))

        return map_leaves(placed, alone)


def load_trees(run: Path, step: int, **placed: Any) -> dict[str, Any]:
    """`Checkpoints.restore` of a run that is not opened for writing; raises as `load_params`."""
    sharding = jax.tree.leaves(placed)[0].sharding
    with _open_step(run, step, sharding) as (manager, where):
        return _restore(manager, where, step, **placed)


@contextlib.contextmanager
def _open_step(
    run: Path, step: int, sharding: Any, **handlers: ocp.CheckpointHandler
) -> Iterator[tuple[ocp.CheckpointManager, Path]]:
    folder = run / "checkpoints"
    there = _steps(folder)
    if step not in there:
        named = ", ".join(map(str, there)) or "none"
        raise UserError(f"{folder}: no step {step}; there are: {named}")
    processes = {device.process_index for device in sharding.device_set}
    with contextlib.ExitStack() as stack:
        here = folder
        if staging.needed(folder):
            here = stack.enter_context(staging.fetched(folder, step))
        yield stack.enter_context(_reader(here, processes, handlers)), folder / str(step)


def _steps(folder: Path) -> list[int]:
    if staging.needed(folder):
        return staging.steps(folder)
    if not storage.is_folder(folder):
        return []
    with _reader(folder) as manager:
        return list(manager.all_steps())


def _reader(
    folder: Path,
    processes: set[int] | None = None,
    handlers: dict[str, ocp.CheckpointHandler] | None = None,
) -> ocp.CheckpointManager:
    """Reads without writing, together with `processes`; alone if that is None."""
    processes = processes or {jax.process_index()}
    options = ocp.CheckpointManagerOptions(
        read_only=True,
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=min(processes),
            active_processes=None if len(processes) == jax.process_count() else processes,
        ),
    )
    return ocp.CheckpointManager(
        storage.absolute(folder), item_handlers=handlers or None, options=options
    )
