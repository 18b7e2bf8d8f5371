"""The order of the layers, held by walking every import in the package.

A module imports from its own layer and from those before it; only `parallel` speaks of shardings;
text and data start in processes that never import JAX.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Modules and folders of one line may import each other; later lines may import earlier ones.
LAYERS = [
    "config errors",
    "flops",
    "parallel",
    "model",
    "adapt",
    "text",
    "data",
    "interop",
    "train",
    "plan",
    "generate",
    "pretrained",
    "evaluate",
    "serve",
    "cli",
    "__main__",
]
ORDER = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}
MODULES = sorted((ROOT / "jllama").rglob("*.py"))
SHARDING = {"jax.sharding", "jax.P", "jax.NamedSharding", "jax.make_mesh", "jax.experimental.mesh_utils"}


def named(path: Path) -> set[str]:
    """Every dotted name that a module imports or reaches through an imported module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def layer(path: Path) -> str:
    return path.relative_to(ROOT / "jllama").with_suffix("").parts[0]
