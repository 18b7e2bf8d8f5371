"""What is written bit by bit, such as logs and traces, on stores that take whole objects only."""

import shutil
import tempfile
import threading
import time
from pathlib import Path

from jllama.errors import UserError
from jllama.files import storage
from jllama.progress import say


class Mirror:
    """A local folder whose files a URL gets whole, every so often and at `close`.

    Where the target is local, `local` is the target itself and there is nothing to copy.
    """

    def __init__(self, target: Path, every: float = 30.0):
        """`every` is in seconds; more if a copy takes more than a twentieth of it."""
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
        """Copies what has changed, now. Raises UserError, or OSError of the local folder."""
        if not self._remote:
            return
        with self._copying:
            for file in sorted(self.local.rglob("*")):
                if not file.is_file():
                    continue
                found = file.stat()
                now = (found.st_size, found.st_mtime_ns)
                if self._copied.get(file) != now:
                    # A copy of what is there now: the file may grow while it is on its way.
                    with tempfile.NamedTemporaryFile() as still:
                        shutil.copyfile(file, still.name)
                        target = self._target / file.relative_to(self.local).as_posix()
                        storage.upload(Path(still.name), target)
                    self._copied[file] = now

    def close(self) -> None:
        """The last copy; a store that does not take it is said on stderr, and the files stay."""
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
        """`sync` that says on stderr what it meets, and goes on: whether all was copied."""
        try:
            self.sync()
        except (UserError, OSError) as e:  # the store may be back by the next time
            say(f"not copied: {e}")
            return False
        return True
