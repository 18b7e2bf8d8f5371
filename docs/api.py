"""Writes the API reference, the docstrings as HTML: python docs/api.py FOLDER

Needs pdoc, which is among the development tools; `make api` writes to build/api.
"""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import jllama
import jllama.train


def main(folder: str) -> None:
    # pdoc sees only what a module holds: these two import their names when they are asked for, and
    # list no submodules.
    for package in (jllama, jllama.train):
        vars(package).update({name: getattr(package, name) for name in package.__all__})
        submodules = [module.name for module in pkgutil.iter_modules(package.__path__)]
        package.__all__ = [*package.__all__, *submodules]
    # An annotation that pydantic has for type checkers alone.
    warnings.filterwarnings("ignore", message="(?s).*PydanticDataclass")
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("jllama", output_directory=Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
