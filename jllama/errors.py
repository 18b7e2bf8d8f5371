"""What ends a program with one line: bad input, and storage that fails."""

import os


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do.

    The command-line programs print it on stderr and exit with `status`; nothing that was already
    written is lost.
    """

    status = 2

    def __str__(self) -> str:
        # Names come from files, and may hold line breaks or a terminal's commands.
        text = super().__str__()
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class StorageError(UserError):
    """Storage that failed, a store that is away or a full disk: the same input may work later."""

    status = os.EX_IOERR  # 74
