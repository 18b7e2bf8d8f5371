"""What ends a program with one line: bad input, and storage that fails."""

import os


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do.

    The command-line programs print it on stderr and exit with `status`; nothing that was already
    written is lost.
    """

    status = 2


class StorageError(UserError):
    """Storage that failed, a store that is away or a full disk: the same input may work later."""

    status = os.EX_IOERR  # 74
