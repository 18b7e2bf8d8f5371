"""The one train step: `state[t+1] = train_step(state[t], frozen, batch(t))`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jllama.config import Config
from jllama.parallel.product import as_sent
from jllama.parallel.sharding import Placement
from jllama.train.compiler import scatters_in_stages, xla_options
from jllama.train.loss import Batch
from jllama.train.optimizer import learning_rate
from jllama.train.state import StateDef, TrainState, as_float32

# (trainable, frozen, batch, key) -> (loss_sum, weight_sum, sums): float32 scalars, summed over
# tokens. `sums` has at least "nll_sum", the negative log-likelihood. In evaluation the key is None.
LossFn = Callable[
    [Any, Any, Batch, jax.Array | None], tuple[jax.Array, jax.Array, dict[str, jax.Array]]
]
StepMetrics = dict[str, jax.Array]  # float32 scalars
# (state, frozen, batch) -> (next state, metrics)
TrainStep = Callable[[TrainState, Any, Batch], tuple[TrainState, StepMetrics]]
# (trainable, frozen, batch) -> (nll_sum, weight_sum)
EvalStep = Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]


def make_train_step(
    config: Config, loss_fn: LossFn, definition: StateDef, placement: Placement
) -> TrainStep:
    """Returns the jitted step: (state, frozen, batch) -> (next state, metrics).

    It donates the state, and neither `frozen` nor the batch. Every random number of step t comes
    from fold_in(key(seed), t). Microbatches add up sums of loss, weight and gradient, which are
    divided once at the end, so that accumulation equals the large batch. After a batch without any
    weighted token only weight decay and momentum move the parameters.

    Args:
      loss_fn: (trainable, frozen, batch, key) -> (loss_sum, weight_sum, sums), for example
        `functools.partial(causal_lm_loss, config)`. The gradient is that of loss_sum / weight_sum.
        `sums` has "nll_sum", and any other sums that are to be reported.

    The metrics are float32 scalars: loss (nll_sum / weight_sum: nats per token, without a z term or
    whatever else the loss function adds), grad_norm (before clipping), learning_rate, weight
    (weight_sum: predicted tokens), and every other sum by its name, divided by weight_sum.
    """
    options = xla_options(config.compute, placement)
    placement = dataclasses.replace(
        placement,
        gradient_dtype=config.training.gradient_dtype,
        scatter_in_stages=scatters_in_stages(options),
    )
    rate = learning_rate(config.training.schedule, config.training.steps)
    optimizer, splits = definition.optimizer, config.training.accumulate

    def gradient(trainable, frozen, batch, key):
        def total(trainable):
            loss, weight, sums = loss_fn(trainable, frozen, batch, key)
            return loss, (weight, sums)

        (_, (weight, sums)), grads = jax.value_and_grad(total, has_aux=True)(trainable)
        return as_float32(grads), weight, sums

    # Each replica adds up its own microbatches first, so that gradients cross slices once a step.
    replicas = 1 if splits == 1 else _replicas(definition, placement)

    def accumulated(trainable, frozen, batch, key):
        if splits == 1:
            return gradient(trainable, frozen, batch, key)
        gradient_of = functools.partial(gradient, trainable, frozen)
        if replicas > 1:
            gradient_of = _map_over_axis(gradient_of, placement, "replica")
        # Microbatch i has the rows i, i + splits, ... of a replica: no row moves between devices.
        ways = (replicas,) if replicas > 1 else ()
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(*ways, -1, splits, *x.shape[1:]), len(ways) + 1, 0),
            batch,
        )
        keys = jax.random.split(key, (splits, *ways))
        first = jax.tree.map(lambda x: x[0], (micro, keys))
        shapes = jax.eval_shape(gradient_of, *first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(carry, xs):
            return jax.tree.map(jnp.add, carry, gradient_of(*xs)), None

        total, _ = jax.lax.scan(add, zeros, (micro, keys))
        if replicas == 1:
            return total
        grads, *sums = total
        # `jnp.sum` would send a bfloat16 gradient as float32.
        grads = jax.tree.map(lambda g: jax.lax.reduce_sum(as_sent(g), (0,)).astype(g.dtype), grads)
        return grads, *jax.tree.map(lambda x: jnp.sum(x, 0), sums)

    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, StepMetrics]:
        with placement.active():
            key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
            grads, weight, sums = accumulated(state.trainable, frozen, batch, key)
            scale = 1.0 / jnp.maximum(weight, 1.0)
            norm = optax.tree.norm(grads) * scale
            with jax.named_scope("optimizer"):
                lr = rate(state.step)
                # One factor both takes the mean and clips: no second copy of the gradient is made.
                clip, factor = config.training.optimizer.clip_norm, scale
                if clip is not None:
                    factor *= jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30))
                grads = jax.tree.map(lambda g: g * factor, grads)
                params = as_float32(state.trainable)
                direction, opt_state = optimizer.update(grads, state.opt_state, params)
                trainable = jax.tree.map(
                    lambda old, p, d: (p - lr * d).astype(old.dtype),
                    state.trainable, params, direction,
                )  # fmt: skip
            means = {name: total * scale for name, total in sums.items()}
            metrics = {
                "loss": means.pop("nll_sum"),
                "grad_norm": norm,
                "learning_rate": lr,
                "weight": weight,
                **means,
            }
            return TrainState(state.step + 1, trainable, opt_state), metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(definition.shardings, placement.replicated()),
        compiler_options=options,
    )


def _replicas(definition: StateDef, placement: Placement) -> int:
    """The number of replicas that can sum gradients apart: 1 where they share out parameters."""
    axes = {
        axis
        for x in jax.tree.leaves((definition.placed, definition.frozen))
        for axis in jax.tree.leaves(tuple(x.sharding.spec))
    }
    return 1 if "replica" in axes else placement.mesh.shape["replica"]


def _map_over_axis(f: Callable[..., Any], placement: Placement, axis: str) -> Callable[..., Any]:
    """Maps `f` over a leading dimension of its arguments, which lies along a mesh axis.

    The devices of each index along that axis compute one entry, without the other devices.
    """
    inner = dataclasses.replace(placement, apart=(axis,))

    def inside(*args):
        with inner.active():
            return f(*args)

    return jax.vmap(inside, spmd_axis_name=axis)


def make_eval_step(config: Config, loss_fn: LossFn, placement: Placement) -> EvalStep:
    """Returns the jitted evaluation: (trainable, frozen, batch) -> (nll_sum, weight_sum).

    Both are float32 scalars, the same on all devices; nothing is donated.
    """

    def eval_step(trainable, frozen, batch):
        with placement.active():
            _, weight, sums = loss_fn(trainable, frozen, batch, None)
            return sums["nll_sum"], weight

    return jax.jit(
        eval_step,
        out_shardings=placement.replicated(),
        compiler_options=xla_options(config.compute, placement),
    )
