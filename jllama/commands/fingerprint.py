"""`jllama fingerprint`: one digest of a checkpoint's parameters and optimizer state."""

import argparse

import jax

from jllama.config import Config, MeshConfig
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.files import storage
from jllama.parallel.mesh import AXES, make_mesh, parse_mesh
from jllama.parallel.sharding import Placement
from jllama.store.find import RECIPE, find
from jllama.store.fingerprint import fingerprint
from jllama.train.state import StateDef, define_state, load_state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder or its URL")
    parser.add_argument("--step", type=int, help="the checkpoint's step [the newest]")
    parser.add_argument(
        "--mesh",
        action="append",
        default=[],
        metavar="AXIS=SIZE,...",
        help=f"devices along {', '.join(AXES)}; 1 where left out; the digest is the same on any"
        " mesh [fsdp over this machine's devices]",
    )


def run(args: argparse.Namespace) -> None:
    found = find(storage.path(args.run_folder))
    if not found.is_run:
        raise UserError(
            f"{found.path}: a model alone; fingerprints are of runs, with their optimizer"
        )
    recipe = recipes.load(found.folder / RECIPE)
    step = found.checkpoint() if args.step is None else args.step
    print(fingerprint(load_state(found.folder, step, _define(recipe, ",".join(args.mesh)))))


def _define(recipe: Config, mesh: str) -> StateDef:
    """The run's state on the mesh asked for, else on all devices, or one where they do not divide.

    The run's own mesh is of the devices that it ran on.
    """

    def on(sizes: MeshConfig, devices: list[jax.Device]) -> StateDef:
        return define_state(recipe, Placement(make_mesh(sizes, devices), recipe.sharding))

    devices = jax.devices()
    try:
        return on(parse_mesh(mesh) if mesh else MeshConfig(), devices)
    except UserError as error:
        if mesh:
            text = str(error).removeprefix("mesh: ")
            raise UserError(
                text if text.startswith("--mesh") else f"--mesh {mesh}: {text}"
            ) from None
        return on(MeshConfig(), devices[:1])
