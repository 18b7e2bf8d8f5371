"""The lock of a folder, where storage has none."""

import errno
import os

import pytest

from jllama.errors import UserError
from jllama.files import locks


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_storage_without_locks_is_said_and_goes_on(tmp_path, monkeypatch, capfd, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locks.locked(tmp_path, busy="busy"):
        pass
    said = capfd.readouterr().err
    assert said == f"{tmp_path}: no locks on this storage; start one run per folder\n"


def test_a_lock_that_fails_otherwise_is_one_line(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match="not locked: Input/output error"),
        locks.locked(tmp_path, busy="busy"),
    ):
        pass
