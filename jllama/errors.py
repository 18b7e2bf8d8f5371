"""The one exception for bad input."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do.

    The command-line programs print it on stderr and exit with status 2; nothing that was already
    written is lost.
    """
