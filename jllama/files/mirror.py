"""Copies files that grow, such as logs and traces, to stores that take whole objects only."""

import shutil
import tempfile
import threading
import time
from pathlib import Path

from jllama.errors import UserError
from jllama.files import storage
from jllama.progress import say


class Mirror:
    """A local folder whose files are uploaded to a URL now and then, and at `close`.

    If the target is local, `local` is the target itself and nothing is copied.
    """

    def __init__(self, target: Path, every: float = 30.0):
        """`every`: seconds between copies; if a copy takes t seconds, it is at least 20 t."""
        self._target, self._every = target, every
        self._remote = storage.is_remote(target)
        self.local = Path(tempfile.mkdtemp(prefix="jllama-")) if self._remote else target
        self._copied: dict[Path, tuple[int, int]] = {}
        self._copying = threading.Lock()
        self._closed = threading.Event()
        if self._remote:
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()

    def sync(self) -> None:
        """Copies the files that changed. Raises UserError, or OSError for the local folder."""
        if not self._remote:
            return
        with self._copying:
            for file in sorted(self.local.rglob("*")):
                if not file.is_file():
                    continue
                stat = file.stat()
                version = (stat.st_size, stat.st_mtime_ns)
                if self._copied.get(file) != version:
                    # Uploads a copy, because the file may grow during the upload.
                    with tempfile.NamedTemporaryFile() as copy:
                        shutil.copyfile(file, copy.name)
                        target = self._target / file.relative_to(self.local).as_posix()
                        storage.copy_file(Path(copy.name), target)
                    self._copied[file] = version

    def close(self) -> None:
        """Copies once more, and removes the local folder; if that fails, says so and keeps it."""
        if not self._remote:
            return
        self._closed.set()
        self._thread.join()
        if self.try_sync():
            shutil.rmtree(self.local)
        else:
            say(f"{self._target}: the newest files are in {self.local}")

    def _follow(self) -> None:
        pause = self._every
        while not self._closed.wait(pause):
            began = time.monotonic()
            self.try_sync()
            pause = max(self._every, 20 * (time.monotonic() - began))

    def try_sync(self) -> bool:
        """Like `sync`, but prints an error on stderr instead; returns whether all was copied."""
        try:
            self.sync()
        except (UserError, OSError) as e:  # the store may be back next time
            say(f"not copied: {e}")
            return False
        return True
