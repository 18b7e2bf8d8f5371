"""Results of commands: a file or folder that appears whole or not at all, and replaces nothing."""

import contextlib
import glob
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jllama.errors import StorageError, UserError
from jllama.files import storage


def check_absent(where: Path) -> None:
    """Raises UserError if a result at `where` would replace anything, or could not be written.

    A local folder that is empty may be replaced.
    """
    empty = storage.is_folder(where) and not storage.is_remote(where) and not any(where.iterdir())
    if not empty and (storage.exists(where) or storage.is_folder(where)):
        raise UserError(f"{where}: exists; choose another name, or remove it")
    if not storage.is_remote(where):
        parent = next(folder for folder in where.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            why = "closed to you, or read-only" if parent.is_dir() else "a file"
            raise UserError(f"{where}: not writable: {parent} is {why}")


def check_room(where: Path, size: int) -> None:
    """Raises StorageError if the disk of a local result has less than `size` bytes left."""
    if storage.is_remote(where):
        return
    parent = next(folder for folder in where.resolve().parents if folder.exists())
    with storage.writing(where):
        free = shutil.disk_usage(parent).free
    if size > free:
        raise StorageError(
            f"{where}: takes {size / 1e9:.2f} GB, and {parent} has {free / 1e9:.2f} GB left"
        )


@contextlib.contextmanager
def new_folder(folder: Path, last: str) -> Iterator[Path]:
    """Gives a local folder to fill, which becomes `folder` when the context ends without error.

    After an error nothing is left. At a URL the file named `last` is uploaded after all others: a
    folder that lacks it is not whole. Raises UserError if `folder` holds anything already.
    """
    check_absent(folder)
    if storage.is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="jllama-") as local:
            yield Path(local)
            files = [(path, folder / path.name) for path in sorted(Path(local).iterdir())]
            storage.transfer([pair for pair in files if pair[0].name != last])
            storage.copy_file(Path(local, last), folder / last)
        return
    folder = folder.resolve()  # a link stays one
    storage.make_folder(folder.parent)
    with storage.writing(folder), storage.replacing(folder) as part:
        part.mkdir()
        yield part


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """Gives a local name to write to, which becomes `file` when the context ends without error.

    After an error nothing is left. Raises UserError if `file` exists.
    """
    check_absent(file)
    if storage.is_remote(file):
        with tempfile.TemporaryDirectory(prefix="jllama-") as local:
            yield Path(local, file.name)
            storage.copy_file(Path(local, file.name), file)
        return
    file = file.resolve()  # a link stays one
    storage.make_folder(file.parent)
    with storage.writing(file), storage.replacing(file) as part:
        yield part


@contextlib.contextmanager
def stoppable(where: Path) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end the process, and leaves nothing of a result that is not whole.

    Orbax's threads may still write when the main thread stops, and would make a removed folder
    again. So `storage.discard` keeps them from it, and the process ends without waiting for them;
    what they print meanwhile is dropped.
    """
    stderr, status = os.dup(2), 0

    def stop(number, _):
        nonlocal status
        if status:
            os._exit(status)  # a second signal, while the first one is cleaning up
        status = 128 + number
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.exit(status)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if status:
            os.write(stderr, b"interrupted\n")
            parts = f"{glob.escape(os.fspath(where.resolve()))}.{os.getpid()}-*.part"
            for part in glob.glob(parts):  # a thread may have made one again
                with contextlib.suppress(OSError):
                    storage.discard(Path(part))
            os._exit(status)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(stderr)
