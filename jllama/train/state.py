"""The training state: what a run is at a step, and how it starts."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jllama.config import Config
from jllama.errors import UserError
from jllama.model import llama
from jllama.model.param import dotted
from jllama.parallel.sharding import Placement
from jllama.train.optimizer import make_optimizer


class TrainState(NamedTuple):
    """`step` optimizer steps have been taken (int32 scalar)."""

    step: jax.Array
    trainable: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class StateDef:
    """How to make the state of a recipe, and how it is placed.

    Attributes:
      init: key -> parameters, pure.
      start: parameters -> TrainState at step 0, pure.
      optimizer: gradient -> direction.
      shapes, shardings: trees like the state.
    """

    init: Callable[[jax.Array], llama.Params]
    start: Callable[[llama.Params], TrainState]
    optimizer: optax.GradientTransformation
    shapes: TrainState
    shardings: TrainState

    @property
    def placed(self) -> TrainState:
        """The state as shapes in their places."""
        return jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
            self.shapes,
            self.shardings,
        )


def as_float32(tree: Any) -> Any:
    """The tree in float32, the dtype of gradients, updates and optimizer state."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def define_state(config: Config, placement: Placement) -> StateDef:
    """The state of a recipe that trains every parameter."""
    _check_rows(config, placement)
    specs = llama.param_specs(config.model, config.compute)
    optimizer = make_optimizer(config.training.optimizer, specs)

    def init(key: jax.Array) -> llama.Params:
        return llama.init_params(config.model, config.compute, key)

    def start(params: llama.Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(as_float32(params)))

    # The key is made inside: outside it would start this machine's devices.
    shapes = jax.eval_shape(lambda: start(init(jax.random.key(0))))
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, s: placement.sharding(s.shape, s.axes, dotted(path)), specs
    )
    opt_shardings = _like_parameters(shapes.opt_state, specs, shardings, placement)
    placed = TrainState(placement.replicated(), shardings, opt_shardings)
    return StateDef(init, start, optimizer, shapes, placed)


def _check_rows(config: Config, placement: Placement) -> None:
    """Raises `UserError` for rows that the context axis would not share out but repeat."""
    length, ways = config.data.length, placement.mesh.shape["context"]
    if length % ways:
        raise UserError(
            f"data.length={length} does not divide by mesh.context={ways}: every device would"
            f" compute whole rows; choose a multiple, best of {2 * ways}"
        )


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


def _like_parameters(opt_state: Any, specs: Any, shardings: Any, placement: Placement) -> Any:
    """Shardings of the optimizer's leaves: where the parameter lives whose path they end with.

    What belongs to no parameter, such as a count of steps, is small and on every device.
    """
    places = {
        path: (spec.shape, place)
        for (path, spec), place in zip(
            jax.tree_util.tree_leaves_with_path(specs), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        for start in range(len(path)):
            shape, sharding = places.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        if leaf.size >= 1024:
            raise ValueError(f"{dotted(path)} {leaf.shape} is like no parameter")
        return placement.replicated()

    return jax.tree_util.tree_map_with_path(place, opt_state)


def init_state(definition: StateDef, seed: int) -> TrainState:
    """The state at step 0, made under jit in its shardings: no device holds more than its part."""
    init = jax.jit(
        lambda key: definition.start(definition.init(key)), out_shardings=definition.shardings
    )
    return init(jax.random.key(seed))


def start_from(definition: StateDef, params: llama.Params) -> TrainState:
    """The state at step 0 with these parameters, which are donated."""
    start = jax.jit(definition.start, donate_argnums=0, out_shardings=definition.shardings)
    return start(params)
