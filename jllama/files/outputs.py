"""What a command makes: a file or folder that appears whole or not at all, and replaces nothing."""

import contextlib
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
    """UserError if a result would replace a file, a folder with anything in it, or is forbidden."""
    empty = storage.is_folder(where) and not storage.is_remote(where) and not any(where.iterdir())
    if not empty and (storage.exists(where) or storage.is_folder(where)):
        raise UserError(f"{where}: exists; choose another name, or remove it")
    if not storage.is_remote(where):
        there = next(folder for folder in where.absolute().parents if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            why = "closed to you, or read-only" if there.is_dir() else "a file"
            raise UserError(f"{where}: not writable: {there} is {why}")


def check_room(where: Path, size: int) -> None:
    """StorageError if the disk of a local result has not `size` bytes left."""
    if storage.is_remote(where):
        return
    there = next(folder for folder in where.resolve().parents if folder.exists())
    with storage.writing(where):
        free = shutil.disk_usage(there).free
    if size > free:
        raise StorageError(
            f"{where}: takes {size / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB left"
        )


@contextlib.contextmanager
def new_folder(folder: Path, last: str) -> Iterator[Path]:
    """A local folder to fill, which becomes `folder` when the context ends well, or nothing.

    At a URL the file named `last` is put after all others: what lacks it is not whole. Raises
    UserError if `folder` holds anything already.
    """
    check_absent(folder)
    if storage.is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="jllama-") as local:
            yield Path(local)
            files = [(path, folder / path.name) for path in sorted(Path(local).iterdir())]
            storage.transfer(storage.upload, [pair for pair in files if pair[0].name != last])
            storage.upload(Path(local, last), folder / last)
        return
    folder = folder.resolve()  # a link stays one
    storage.make_folder(folder.parent)
    with storage.writing(folder), storage.replacing(folder) as part:
        part.mkdir()
        yield part


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A local name to write to, which becomes `file` when the context ends well, or nothing.

    Raises UserError if `file` exists.
    """
    check_absent(file)
    if storage.is_remote(file):
        with tempfile.TemporaryDirectory(prefix="jllama-") as local:
            yield Path(local, file.name)
            storage.upload(Path(local, file.name), file)
        return
    file = file.resolve()  # a link stays one
    storage.make_folder(file.parent)
    with storage.writing(file), storage.replacing(file) as part:
        yield part


@contextlib.contextmanager
def stoppable(where: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process, and leave nothing of a result that is not whole.

    A folder that threads still write to, as Orbax's do, they would make again, and tell of each
    file that they miss. So they are ended first: another program takes the place of this one, with
    its process number, and removes what is left.
    """
    stderr, status = os.dup(2), 0

    def stop(number, _):
        nonlocal status
        if status:
            os._exit(status)  # asked again, while it was cleaning up
        status = 128 + number
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.exit(status)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if status:
            os.dup2(stderr, 1)
            clean = 'rm -rf -- "$0".$$-*.part; echo interrupted; exit "$1"'
            os.execv("/bin/sh", ["sh", "-c", clean, os.fspath(where.resolve()), str(status)])
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(stderr)
