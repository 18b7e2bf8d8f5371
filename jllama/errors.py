"""Errors that end a program with one line: bad input, and storage that fails."""

import os


class UserError(Exception):
    """Bad input; the message is one line that says what is wrong, where, and what to do.

    The command-line programs print it on stderr and exit with `status`. Nothing that was already
    written is lost.
    """

    status = 2

    def __str__(self) -> str:
        # Names come from files, and may hold line breaks or control characters.
        text = super().__str__()
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Stopped(BaseException):
    """A signal asked a run to stop where there is nothing to save; the message is one line.

    It is no `Exception`, so that nothing takes it for a failure of what was being done.
    """

    status = os.EX_TEMPFAIL  # 75: start it again


class StorageError(UserError):
    """Storage failed, such as an unreachable store or a full disk: trying again may succeed."""

    status = os.EX_IOERR  # 74


def install(extra: str) -> str:
    """The command that installs an extra of this package, in its checkout, as messages name it."""
    return f"pip install -c requirements.txt -e '.[{extra}]'"
