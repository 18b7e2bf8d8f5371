"""The one train step: `state[t+1] = train_step(state[t], frozen, batch(t))`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jllama.config import Config
from jllama.parallel.sharding import Placement
from jllama.train.loss import Batch
from jllama.train.optimizer import make_schedule
from jllama.train.state import StateDef, TrainState, as_float32

# (trainable, frozen, batch, key) -> (loss_sum, weight_sum, metric sums); in evaluation key is None
LossFn = Callable[
    [Any, Any, Batch, jax.Array | None], tuple[jax.Array, jax.Array, dict[str, jax.Array]]
]
StepMetrics = dict[str, jax.Array]


def make_train_step(
    config: Config, loss_fn: LossFn, definition: StateDef, placement: Placement
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, StepMetrics]]:
    """The jitted step; the state is donated, `frozen` is an argument and is not.

    Every random number of step t comes from fold_in(key(seed), t). Microbatches carry sums of loss,
    weight and gradient, divided once at the end: accumulation equals the large batch. A batch
    without a single weighted token leaves the parameters to weight decay and momentum alone.

    Metrics: loss (nats per token, without the z term), grad_norm (before clipping), learning_rate,
    weight (predicted tokens).
    """
    rate = make_schedule(config.training)
    optimizer, splits = definition.optimizer, config.training.accumulate

    def gradient(trainable, frozen, batch, key):
        def total(trainable):
            loss, weight, sums = loss_fn(trainable, frozen, batch, key)
            return loss, (weight, sums)

        (_, (weight, sums)), grads = jax.value_and_grad(total, has_aux=True)(trainable)
        return as_float32(grads), weight, sums

    # Replicas add up their own microbatches first: between slices gradients go once.
    replicas = 1 if splits == 1 else _replicas(definition, placement)

    def accumulated(trainable, frozen, batch, key):
        if splits == 1:
            return gradient(trainable, frozen, batch, key)
        one = functools.partial(gradient, trainable, frozen)
        if replicas > 1:
            one = _apart(one, placement, "replica")
        # Microbatch i takes rows i, i + splits, ... of a replica: every device keeps to its own.
        ways = (replicas,) if replicas > 1 else ()
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(*ways, -1, splits, *x.shape[1:]), len(ways) + 1, 0),
            batch,
        )
        keys = jax.random.split(key, (splits, *ways))
        first = jax.tree.map(lambda x: x[0], (micro, keys))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, *first))

        def add(carry, xs):
            return jax.tree.map(jnp.add, carry, one(*xs)), None

        total, _ = jax.lax.scan(add, zeros, (micro, keys))
        return jax.tree.map(lambda x: jnp.sum(x, 0), total) if replicas > 1 else total

    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, StepMetrics]:
        with placement.active():
            key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
            grads, weight, sums = accumulated(state.trainable, frozen, batch, key)
            scale = 1.0 / jnp.maximum(weight, 1.0)
            norm = optax.tree.norm(grads) * scale
            with jax.named_scope("optimizer"):
                lr = rate(state.step)
                # Mean and clipping are one factor, so that no second copy of the gradient is made.
                clip = config.training.optimizer.clip_norm
                factor = scale * jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30))
                grads = jax.tree.map(lambda g: g * factor, grads)
                params = as_float32(state.trainable)
                direction, opt_state = optimizer.update(grads, state.opt_state, params)
                trainable = jax.tree.map(
                    lambda old, p, d: (p - lr * d).astype(old.dtype),
                    state.trainable, params, direction,
                )  # fmt: skip
            metrics = {
                "loss": sums["nll_sum"] * scale,
                "grad_norm": norm,
                "learning_rate": lr,
                "weight": weight,
            }
            return TrainState(state.step + 1, trainable, opt_state), metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(definition.shardings, placement.replicated()),
    )


def _replicas(definition: StateDef, placement: Placement) -> int:
    """How many replicas can sum gradients by themselves: 1 where they share out parameters."""
    used = {
        axis
        for x in jax.tree.leaves((definition.placed, definition.frozen))
        for axis in jax.tree.leaves(tuple(x.sharding.spec))
    }
    return 1 if "replica" in used else placement.mesh.shape["replica"]


def _apart(f: Callable[..., Any], placement: Placement, axis: str) -> Callable[..., Any]:
    """`f` of the devices of each index along a mesh axis, over leading dimensions of that size."""
    inner = dataclasses.replace(placement, apart=(axis,))

    def one(*args):
        with inner.active():
            return f(*args)

    return jax.vmap(one, spmd_axis_name=axis)


def make_eval_step(
    loss_fn: LossFn, placement: Placement
) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted evaluation of one batch: (trainable, frozen, batch) -> (nll_sum, weight_sum)."""

    def eval_step(trainable, frozen, batch):
        with placement.active():
            _, weight, sums = loss_fn(trainable, frozen, batch, None)
            return sums["nll_sum"], weight

    return jax.jit(eval_step, out_shardings=placement.replicated())
