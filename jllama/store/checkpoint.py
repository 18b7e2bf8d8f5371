"""Checkpoints: named trees of arrays, saved while training goes on.

`RUN/checkpoints/STEP/NAME` holds one tree in Orbax's format, readable on any mesh and number of
processes. A run saves `trainable`, its parameters or its overlay, and `rest`, the step and the
optimizer's state; a model or an adapter alone has a step 0 with `trainable`.
"""

import contextlib
import functools
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jllama.errors import StorageError, UserError
from jllama.files import storage
from jllama.model import llama
from jllama.model.param import EachLeaf, dotted, map_leaves
from jllama.parallel.distributed import is_loss
from jllama.store import staging
from jllama.store.find import CHECKPOINTS, complete_steps, is_complete, latest_step
from jllama.store.staging import Staging

# Orbax tells every save at INFO and WARNING, and prints the traceback of an error that it also
# raises; what a user needs to know is said here.
logging.getLogger("absl").setLevel(logging.CRITICAL)

_CHUNK_BYTES = 32 << 20
_LEAST_ROOM = 256 << 20


class Checkpoints:
    """The checkpoints of one run. Saves are asynchronous; `close` waits for them.

    Every process calls every method: each writes and reads the shards of its own devices.
    """

    def __init__(self, run: Path, keep: int | None, copies: float | None = None):
        """Opens RUN/checkpoints, and removes what a killed run left half written.

        Args:
          keep: how many of the newest steps stay; None: all.
          copies: the most bytes that wait in host memory to be written, at least `room_for`; then
            `save` returns only when nearly everything is written. None: a copy of all trees.
        """
        self._folder = run / CHECKPOINTS
        self._staging = Staging(self._folder, keep) if staging.needed(self._folder) else None
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        local = self._staging.local if self._staging else storage.absolute(self._folder)
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
        self._manager = ocp.CheckpointManager(local, item_handlers=handlers, options=options)

    def latest(self) -> int | None:
        """The newest complete step."""
        if self._staging:
            return latest_step(self._folder.parent)
        return self._manager.latest_step()

    def save(self, step: int, **trees: Any) -> None:
        """Starts saving the trees by their names; returns once their arrays may be donated.

        Raises `StorageError` when this save or the one before it cannot be written, and `UserError`
        for a step that is not above all those that are saved.
        """
        with _writing(self._folder / str(step)):
            if self._staging:
                self._staging.wait()  # Orbax may drop the step that is being copied
            args = {name: self._item(tree, _chunks(tree)) for name, tree in trees.items()}
            if not self._manager.save(step, args=ocp.args.Composite(**args)):
                raise UserError(
                    f"{self._folder}: step {step} is not saved, since step {self.latest()} is"
                    " there; go on from that, or choose another folder"
                )
        if self._staging:
            self._staging.publish(step, self._manager.wait_until_finished)

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
    """The least host memory, in bytes, with which Orbax saves or restores: the largest array's.

    Orbax counts whole chunks, and a device's shard of an array may touch all of its chunks.
    """
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    return max(1.01 * largest, _LEAST_ROOM)


def _chunks(tree: Any) -> Any:
    """Orbax's arguments that store arrays in chunks of at most `_CHUNK_BYTES`.

    A chunk is read whole. With Orbax's default, one chunk per shard, each of many devices would
    read the whole array that one device saved.
    """
    return jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)


def load_trees(run: Path, step: int, **placed: Any) -> dict[str, Any]:
    """Trees of a step by their names, each straight into the places of `jax.ShapeDtypeStruct`s.

    Called by the processes whose devices those are. Raises `UserError` when there is no such step,
    it is incomplete, or a tree has other leaves.
    """
    with (
        _step_folder(run, step, placed) as folder,
        contextlib.closing(ocp.StandardCheckpointHandler()) as handler,
    ):
        return {
            name: _restore(handler, folder / name, run, step, ocp.args.StandardRestore(tree))
            for name, tree in placed.items()
        }


def load_params(
    run: Path, step: int, placed: llama.Params, each: EachLeaf | None = None
) -> llama.Params:
    """The tree `trainable` of a step, with little more than one array in the host's memory.

    Args:
      placed: `llama.placed_shapes`.
      each: what is kept of an array, before the next one is read.

    Called by the same processes as `load_trees`, and raises the same errors.
    """
    kind = ocp.PyTreeCheckpointHandler if each else ocp.StandardCheckpointHandler
    # By default Orbax would hold all of it on the host as well.
    handler = kind(restore_concurrent_gb=room_for(placed) / 1e9)
    with _step_folder(run, step, ["trainable"]) as folder, contextlib.closing(handler):
        restore = functools.partial(_restore, handler, folder / "trainable", run, step)
        if each is None:
            return restore(ocp.args.StandardRestore(placed))

        def alone(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
            part = functools.reduce(lambda tree, key: {key: tree}, path.split(".")[::-1], leaf)
            return each(path, *jax.tree.leaves(restore(_part(part))))

        return map_leaves(placed, alone)


@contextlib.contextmanager
def _step_folder(run: Path, step: int, trees: Collection[str]) -> Iterator[Path]:
    """The folder of a complete step; from a store that Orbax does not read, a copy of `trees`."""
    folder = run / CHECKPOINTS
    if not is_complete(folder, step):
        steps = ", ".join(map(str, complete_steps(folder))) or "none"
        raise UserError(f"{folder}: no step {step}; there are: {steps}")
    if staging.needed(folder):
        with staging.fetched(folder, step, trees) as local:
            yield local
    else:
        yield storage.absolute(folder) / str(step)


def _restore(
    handler: ocp.CheckpointHandler,
    folder: Path,
    run: Path,
    step: int,
    asked: ocp.args.CheckpointArgs,
) -> Any:
    """The tree in `folder`; errors name the run's step."""
    where = run / CHECKPOINTS / str(step)
    try:
        # A manager would list and check the whole run, and wait for processes without a part.
        restored = handler.restore(epath.Path(folder), args=asked)
    except Exception as e:  # Orbax raises what its storage raises
        if is_loss(e):
            raise
        reason = storage.one_line(e)
        before = [s for s in complete_steps(run / CHECKPOINTS) if s < step]
        advice = f"; delete {where}: step {before[-1]} is before it" if before else ""
        raise UserError(
            f"{where}: not readable as this model's checkpoint: {reason}{advice}"
        ) from e
    leaves = jax.tree_util.tree_leaves_with_path(asked.item)
    for (path, want), got in zip(leaves, jax.tree.leaves(restored), strict=True):
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
