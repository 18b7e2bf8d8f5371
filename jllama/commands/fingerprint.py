"""`jllama fingerprint`: one digest of a checkpoint's parameters and optimizer state."""

import argparse

from jllama import recipe as recipes
from jllama import storage
from jllama.errors import UserError
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.train.checkpoint import latest_step, load_state
from jllama.train.fingerprint import fingerprint
from jllama.train.state import define_state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder or its URL")
    parser.add_argument("--step", type=int, help="the checkpoint's step [the newest]")
    parser.add_argument(
        "--mesh",
        action="append",
        default=[],
        metavar="AXIS=SIZE",
        help="read it onto another mesh; the digest stays the same",
    )


def run(args: argparse.Namespace) -> None:
    folder = storage.path(args.run_folder)
    if not storage.exists(folder / "config.yaml"):
        raise UserError(f"{folder}: no run folder, config.yaml is missing")
    recipe = recipes.load(folder / "config.yaml", [f"mesh.{size}" for size in args.mesh])
    step = latest_step(folder) if args.step is None else args.step
    if step is None:
        raise UserError(f"{folder}: the run has no checkpoint yet; train it first")
    definition = define_state(recipe, Placement(make_mesh(recipe.mesh), recipe.sharding))
    print(fingerprint(load_state(folder, step, definition)))
