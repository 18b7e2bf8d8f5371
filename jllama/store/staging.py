"""Checkpoints on stores that Orbax does not write, s3:// today: made locally, then copied.

Orbax's arrays go through TensorStore's drivers for local files and for gs:// alone. A step is
complete at the URL once `STEP/commit_success.txt` is there, which is put last: the name and meaning
that Orbax gives it on gs://. One process only: each would see no other's part of a step.
"""

import contextlib
import glob
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import jax

from jllama.errors import StorageError, UserError
from jllama.files import storage
from jllama.store.find import COMMITTED, complete_steps


def needed(folder: Path) -> bool:
    """Whether Orbax cannot write to this folder, so that its checkpoints are staged locally."""
    return str(folder).startswith("s3://")


@contextlib.contextmanager
def fetched(folder: Path, step: int, trees: Collection[str]) -> Iterator[Path]:
    """Copies some trees of a step to a local folder, which the context removes when it ends.

    Raises UserError if the step is not complete after the copy: another process that removes a step
    removes its marker first.
    """
    with tempfile.TemporaryDirectory(prefix="jllama-checkpoint-") as local:
        remote = folder / str(step)
        pairs = []
        for tree in trees:
            for name in storage.matches(f"{glob.escape(str(remote / tree))}/**"):
                file = Path(local, name.removeprefix(f"{remote}/"))
                file.parent.mkdir(parents=True, exist_ok=True)
                pairs.append((storage.path(name), file))
        try:
            storage.transfer(pairs)
        finally:
            if not storage.exists(remote / COMMITTED):
                raise UserError(f"{remote}: not complete; another run may be removing it")
        yield Path(local)


class Staging:
    """A local folder that Orbax saves to, and the thread that copies its steps to the URL."""

    def __init__(self, folder: Path, keep: int | None):
        """Raises UserError for a run of several processes."""
        if jax.process_count() > 1:
            raise UserError(
                f"{folder}: checkpoints of several processes go to gs:// or a mounted folder;"
                " mount the bucket, or choose another run.folder"
            )
        self._folder, self._keep = folder, keep
        self._temporary = tempfile.TemporaryDirectory(prefix="jllama-checkpoints-")
        self.local = Path(self._temporary.name)
        self._thread: threading.Thread | None = None
        self._error: UserError | None = None

    def publish(self, step: int, saved: Callable[[], None]) -> None:
        """Starts a thread that copies the step to the URL, and removes old steps there.

        The thread first calls `saved`, which returns once the step is complete in the local folder,
        and raises if it was not saved.
        """
        self.wait()
        self._thread = threading.Thread(target=self._publish, args=(step, saved), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns once the published step is at the URL. Raises UserError if it is not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits for the thread, and removes the local folder."""
        if self._thread is not None:
            self._thread.join()
        self._temporary.cleanup()

    def _publish(self, step: int, saved: Callable[[], None]) -> None:
        local, remote = self.local / str(step), self._folder / str(step)
        try:
            saved()
            # A run that was killed may have left files of this step.
            storage.remove_folder(remote)
            files = [f for f in local.rglob("*") if f.is_file()]
            pairs = [(f, remote / f.relative_to(local).as_posix()) for f in files]
            storage.transfer(pairs)
            storage.write_text(remote / COMMITTED, f"{len(files)} files\n")
            for old in complete_steps(self._folder)[: -self._keep] if self._keep else []:
                storage.remove(self._folder / str(old) / COMMITTED)  # first, and so it is gone
                storage.remove_folder(self._folder / str(old))
        except UserError as e:
            self._error = e
        except Exception as e:  # a thread's exception reaches nobody: `wait` raises it
            self._error = StorageError(f"{remote}: not written: {storage.one_line(e)}")
