"""Locks a folder for one process of a machine at a time."""

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path

from jllama.errors import UserError
from jllama.files import storage
from jllama.progress import say

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}  # Lustre, NFS


@contextlib.contextmanager
def locked(folder: Path, name: str = ".lock", *, busy: str = "") -> Iterator[None]:
    """Makes a local folder and locks it against other processes of this machine.

    Waits for the lock; with `busy`, raises UserError(`busy`) instead of waiting. A URL is not
    locked. On storage without locks it prints a note on stderr and goes on.
    """
    if storage.is_remote(folder):
        yield
        return
    storage.make_folder(folder)
    with storage.writing(folder):
        lock = open(folder / name, "w")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise UserError(f"{folder}: {busy}") from None
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise UserError(f"{folder}: not locked: {e.strerror or e}") from None
            say(f"{folder}: no locks on this storage; start one run per folder")
        yield
