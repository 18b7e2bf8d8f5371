"""The training state: its shapes, its placement on a mesh, and how it is made.

A run trains every parameter, or a LoRA overlay. The parameters of the overlay's base are no part of
the state: they are `frozen`, an argument of the step beside it.
"""

import dataclasses
import functools
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
from jllama.store.find import CHECKPOINTS
from jllama.train.optimizer import make_optimizer
from jllama.train.placement import check_rows


class TrainState(NamedTuple):
    """The state after some optimizer steps: what a checkpoint holds.

    Attributes:
      step: how many steps have been taken, int32 scalar.
      trainable: the parameters in `compute.param_dtype`, or an overlay.
      opt_state: the optimizer's state; its moments are float32, whatever the parameters are.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class StateDef:
    """How the state of a recipe is made, and where it lies.

    Attributes:
      init: (base, key) -> fresh `trainable`, a pure function. The base is () when every parameter
        is trained.
      start: `trainable` -> TrainState at step 0, a pure function.
      optimizer: gradient -> direction, to be multiplied by minus the learning rate.
      shapes, shardings: the state with a `jax.ShapeDtypeStruct`, or a sharding, at each leaf.
      frozen: the base's parameters that are not trained, as shapes with shardings; () when every
        parameter is trained.
    """

    init: Callable[[Any, jax.Array], Any]
    start: Callable[[Any], TrainState]
    optimizer: optax.GradientTransformation
    shapes: TrainState
    shardings: TrainState
    frozen: Any = ()

    @property
    def placed(self) -> TrainState:
        """The state with a `jax.ShapeDtypeStruct` at each leaf, its sharding included."""
        return jax.tree.map(lambda s, p: s.update(sharding=p), self.shapes, self.shardings)


def to_trees(state: TrainState) -> dict[str, Any]:
    """Returns the trees of a checkpoint, {"trainable", "rest"}, as `Checkpoints.save` takes them:
    `checkpoints.save(step, **to_trees(state))`.
    """
    return {
        "trainable": state.trainable,
        "rest": {"step": state.step, "opt_state": state.opt_state},
    }


def from_trees(trees: dict[str, Any]) -> TrainState:
    """Returns the state whose `to_trees` is given."""
    return TrainState(trees["rest"]["step"], trees["trainable"], trees["rest"]["opt_state"])


def load_state(run: Path, step: int, definition: StateDef) -> TrainState:
    """Reads the state from a run's checkpoint of `step`, straight into the definition's shardings.

    The run may have been on another mesh. Every process calls it, and reads what its own devices
    hold. Raises `UserError` when there is no such checkpoint, it has other shapes, or its folder
    has the name of another step.
    """
    state = from_trees(load_trees(run, step, **to_trees(definition.placed)))
    if (held := int(state.step)) != step:
        raise UserError(
            f"{run / CHECKPOINTS / str(step)}: holds the state of step {held}: its folder was"
            " renamed or copied; give it that name back, or delete it"
        )
    return state


def as_float32(tree: Any) -> Any:
    """Returns the tree in float32, the dtype of gradients, updates and optimizer state."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def define_state(config: Config, placement: Placement) -> StateDef:
    """Says what the recipe's state is and where it lies; computes nothing.

    Raises `UserError`, with the parameter's path, for an array that the mesh cannot share out as
    the sharding rules ask.
    """
    check_rows(config, placement)
    if isinstance(config.adapt, LoraConfig):
        specs = lora.overlay_specs(config.model, config.compute, config.adapt)
        base = map_leaves(base_shapes(config, placement), base_quantizer(config))
        frozen = lora.without_whole(base, specs)
        init = functools.partial(lora.init_overlay, config.model, config.compute, config.adapt)
    else:
        specs, base, frozen = llama.param_specs(config.model, config.compute), (), ()

        def init(base: Any, key: jax.Array) -> llama.Params:
            return llama.init_params(config.model, config.compute, key)

    optimizer = make_optimizer(config.training.optimizer, specs)
    ratio = getattr(config.adapt, "learning_rate_ratio", 1.0)
    if ratio != 1.0:
        optimizer = optax.chain(optimizer, _scale_b(ratio))

    def start(trainable: Any) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, trainable, optimizer.init(as_float32(trainable)))

    # The key is made inside eval_shape: outside, it would start this machine's devices.
    shapes = jax.eval_shape(lambda base: start(init(base, jax.random.key(0))), base)
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, s: placement.sharding(s.shape, s.axes, dotted(path)), specs
    )
    opt_shardings = _like_parameters(shapes.opt_state, specs, shardings, placement)
    placed = TrainState(placement.replicated(), shardings, opt_shardings)
    return StateDef(init, start, optimizer, shapes, placed, frozen)


def _scale_b(ratio: float) -> optax.GradientTransformation:
    """Multiplies the direction of each factor `b` of an overlay by the ratio (arXiv:2402.12354)."""

    def scaled(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x * ratio if path[-1].key == "b" else x

    return optax.stateless(lambda xs, _: jax.tree_util.tree_map_with_path(scaled, xs))


def base_shapes(config: Config, placement: Placement) -> llama.Params:
    """Returns the base's parameters, as they are read, as shapes with shardings.

    Matrices have the dtype of the computation, scales of norms float32.
    """
    return llama.placed_shapes(config.model, placement, config.compute.dtype, "float32")


def base_quantizer(config: Config) -> EachLeaf:
    """Returns what quantises a base's leaf as `config.adapt` says; it maps shapes to shapes."""
    overlay = lora.overlay_specs(config.model, config.compute, config.adapt)
    return quant.quantizer(config.model, config.adapt.quantize, lora.whole_leaves(overlay))


def _like_parameters(opt_state: Any, specs: Any, shardings: Any, placement: Placement) -> Any:
    """Returns shardings of the optimizer's leaves.

    A leaf whose path ends with a parameter's path, and which has its shape, lies as the parameter
    does. Other leaves, such as a count of steps, are small and are replicated.
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
            raise ValueError(f"{dotted(path)} {leaf.shape}: no parameter has its path and shape")
        return placement.replicated()

    return jax.tree_util.tree_map_with_path(place, opt_state)


def init_state(definition: StateDef, seed: int, base: Any = ()) -> TrainState:
    """Makes the state at step 0 under jit, in its shardings: no device holds more than its shard.

    Args:
      seed: the fresh parameters are drawn from `jax.random.key(seed)`.
      base: where an overlay is trained, the parameters of its base; else ().
    """
    init = jax.jit(
        lambda base, key: definition.start(definition.init(base, key)),
        out_shardings=definition.shardings,
    )
    return init(base, jax.random.key(seed))


def start_from(definition: StateDef, params: Any) -> TrainState:
    """Makes the state at step 0 whose `trainable` is `params`, an overlay or all parameters.

    Donates `params`, and casts it to the state's dtypes.
    """

    def start(params: Any) -> TrainState:
        wanted = definition.shapes.trainable
        return definition.start(jax.tree.map(lambda x, s: x.astype(s.dtype), params, wanted))

    return jax.jit(start, donate_argnums=0, out_shardings=definition.shardings)(params)
