"""The training state: what a run is at a step, and how it starts.

A run trains every parameter, or a LoRA overlay; then the base's parameters are `frozen`, an
argument of the step beside the state.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jllama.adapt import lora, quant
from jllama.config import Config, LoraConfig
from jllama.errors import UserError
from jllama.model import llama
from jllama.model.param import EachLeaf, dotted, map_leaves
from jllama.parallel.sharding import Placement
from jllama.store.checkpoint import load_trees
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
      init: (base, key) -> what is trained, pure; the base is () where everything is.
      start: what is trained -> TrainState at step 0, pure.
      optimizer: gradient -> direction.
      shapes, shardings: trees like the state.
      frozen: what is used of the base and not trained, as placed shapes; () likewise.
    """

    init: Callable[[Any, jax.Array], Any]
    start: Callable[[Any], TrainState]
    optimizer: optax.GradientTransformation
    shapes: TrainState
    shardings: TrainState
    frozen: Any = ()

    @property
    def placed(self) -> TrainState:
        """The state as shapes in their places."""
        return jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
            self.shapes,
            self.shardings,
        )


def to_trees(state: TrainState) -> dict[str, Any]:
    """The state as the named trees of a checkpoint: {"trainable", "rest"}."""
    return {
        "trainable": state.trainable,
        "rest": {"step": state.step, "opt_state": state.opt_state},
    }


def from_trees(trees: dict[str, Any]) -> TrainState:
    """The inverse of `to_trees`."""
    return TrainState(trees["rest"]["step"], trees["trainable"], trees["rest"]["opt_state"])


def load_state(run: Path, step: int, definition: StateDef) -> TrainState:
    """The state that a run's checkpoint of `step` holds, in the definition's shardings.

    Raises `UserError` when there is no such checkpoint, or it has other shapes.
    """
    return from_trees(load_trees(run, step, **to_trees(definition.placed)))


def as_float32(tree: Any) -> Any:
    """The tree in float32, the dtype of gradients, updates and optimizer state."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def define_state(config: Config, placement: Placement) -> StateDef:
    """The state of a recipe that trains every parameter, or an overlay as `config.adapt` says."""
    _check_rows(config, placement)
    if isinstance(config.adapt, LoraConfig):
        specs = lora.overlay_specs(config.model, config.compute, config.adapt)
        base = map_leaves(base_shapes(config, placement), freezer(config))
        frozen = lora.without_whole(base, specs)
        init = functools.partial(lora.init_overlay, config.model, config.compute, config.adapt)
    else:
        specs, base, frozen = llama.param_specs(config.model, config.compute), (), ()

        def init(base: Any, key: jax.Array) -> llama.Params:
            return llama.init_params(config.model, config.compute, key)

    optimizer = make_optimizer(config.training.optimizer, specs)
    ratio = getattr(config.adapt, "learning_rate_ratio", 1.0)
    if ratio != 1.0:
        optimizer = optax.chain(optimizer, _faster_b(ratio))

    def start(trainable: Any) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, trainable, optimizer.init(as_float32(trainable)))

    # The key is made inside: outside it would start this machine's devices.
    shapes = jax.eval_shape(lambda base: start(init(base, jax.random.key(0))), base)
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, s: placement.sharding(s.shape, s.axes, dotted(path)), specs
    )
    opt_shardings = _like_parameters(shapes.opt_state, specs, shardings, placement)
    placed = TrainState(placement.replicated(), shardings, opt_shardings)
    return StateDef(init, start, optimizer, shapes, placed, frozen)


def _faster_b(ratio: float) -> optax.GradientTransformation:
    """Directions of an overlay, those of each `b` times the ratio (arXiv:2402.12354)."""

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x * ratio if path[-1].key == "b" else x

    return optax.stateless(lambda xs, _: jax.tree_util.tree_map_with_path(one, xs))


def base_shapes(config: Config, placement: Placement) -> llama.Params:
    """The base's parameters as they are read: matrices in the dtype that they are used in."""
    return llama.placed_shapes(config.model, placement, config.compute.dtype, "float32")


def freezer(config: Config) -> EachLeaf:
    """How the base is kept: quantised if `config.adapt` says so. Shapes give shapes."""
    overlay = lora.overlay_specs(config.model, config.compute, config.adapt)
    whole = {".".join(path) for path, _ in lora.whole_leaves(overlay)}
    return quant.quantizer(config.model, config.adapt.quantize, whole)


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


def init_state(definition: StateDef, seed: int, base: Any = ()) -> TrainState:
    """The state at step 0, made under jit in its shardings: no device holds more than its part."""
    init = jax.jit(
        lambda base, key: definition.start(definition.init(base, key)),
        out_shardings=definition.shardings,
    )
    return init(base, jax.random.key(seed))


def start_from(definition: StateDef, params: Any) -> TrainState:
    """The state at step 0 with these parameters, or this overlay, which are donated."""

    def start(params: Any) -> TrainState:
        wanted = definition.shapes.trainable
        return definition.start(jax.tree.map(lambda x, s: x.astype(s.dtype), params, wanted))

    return jax.jit(start, donate_argnums=0, out_shardings=definition.shardings)(params)
