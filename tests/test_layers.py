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
    "errors progress platforms",
    "files",
    "config",
    "flops chips",
    "parallel",
    "model",
    "adapt",
    "text",
    "data",
    "interop",
    "store",
    "generate",
    "train",
    "evaluate",
    "serve",
    "plan",
    "commands",
    "cli",
    "__main__",
]
ORDER = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}
MODULES = sorted((ROOT / "jllama").rglob("*.py"))
SHARDING = {
    "jax.sharding",
    "jax.P",
    "jax.NamedSharding",
    "jax.make_mesh",
    "jax.shard_map",
    "jax.set_mesh",
    "jax.experimental.mesh_utils",
}


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


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "jllama")))
def test_a_module_imports_only_from_its_own_layer_and_earlier_ones(path):
    own = layer(path)
    if own == "__init__":
        pytest.skip("the package's door is lazy: it names modules and imports none")
    assert own in ORDER, f"{own} has no place among the layers: add it to LAYERS"
    for name in named(path):
        parts = name.split(".")
        if parts[0] == "jllama" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER[parts[1]] <= ORDER[own], f"{path}: {own} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "jllama")))
def test_only_parallel_speaks_of_shardings(path):
    if layer(path) != "parallel":
        found = [n for n in named(path) if any(n == s or n.startswith(s + ".") for s in SHARDING)]
        assert not found, f"{path}: {found}: say it through jllama.parallel"


@pytest.mark.parametrize("module", ["jllama", "jllama.config", "jllama.text.tokenizer"])
def test_importing_what_tokenising_needs_does_not_import_jax(module):
    code = f"import sys, {module}; print('jax' in sys.modules, 'flax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.split() == ["False", "False"], run.stderr


def test_the_order_sees_a_module_that_reaches_forward(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("import jax\nfrom jllama import train\nspec = jax.sharding.PartitionSpec()\n")
    assert {"jllama.train", "jax.sharding"} <= named(path)
