"""A function that ends its process; a module of its own, for a process to import it quickly."""

import os


def die(_) -> None:
    os._exit(1)
