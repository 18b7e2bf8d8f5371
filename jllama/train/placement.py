"""The mesh of a run, and whether its batches can be spread over it."""

import math
from collections.abc import Sequence

import jax

from jllama.config import Config
from jllama.errors import UserError
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement


def make_placement(config: Config, devices: Sequence[jax.Device] | None = None) -> Placement:
    """Returns the recipe's mesh over `devices` (all by default) with its sharding rules.

    Raises `UserError` when the mesh does not fill the devices, or when they cannot share out the
    batches of training or evaluation.
    """
    placement = Placement(make_mesh(config.mesh, devices), config.sharding)
    check_batches(config, placement)
    return placement


def check_batches(config: Config, placement: Placement) -> None:
    """Raises `UserError` for a batch, of training or evaluation, that devices cannot share out."""
    training = config.training
    _check_batch("training.batch_size", training.batch_size, training.accumulate, placement)
    if config.data.held_out:
        _check_batch("eval.batch_size", config.eval.batch_size, 1, placement)


def _check_batch(key: str, rows: int, splits: int, placement: Placement) -> None:
    candidates = placement.rules.batch
    if None in candidates:
        return
    ways = {math.prod(placement.mesh.shape[a] for a in c): c for c in candidates}
    units = [splits * n for n in ways]
    if any(rows % unit == 0 for unit in units):
        return
    below, above = max(rows // u * u for u in units), min(-(-rows // u) * u for u in units)
    nearest = f"{below} or {above}" if below else above
    least = min(ways)
    micro = f"training.accumulate={splits} microbatches x " if splits > 1 else ""
    axes = " x ".join(f"mesh.{axis}" for axis in ways[least])
    raise UserError(
        f"{key}={rows}: must be a multiple of {splits * least}, {micro}the {least} devices that"
        f" share out rows ({axes}); nearest: {nearest}"
    )


def check_rows(config: Config, placement: Placement) -> None:
    """Raises `UserError` for rows that the mesh axis `context` does not divide.

    Such rows would not be shared out: every device along the axis would compute whole rows.
    """
    length, ways = config.data.length, placement.mesh.shape["context"]
    if length % ways:
        raise UserError(
            f"data.length={length} does not divide by mesh.context={ways}: every device would"
            f" compute whole rows; choose a multiple, best of {2 * ways}"
        )
