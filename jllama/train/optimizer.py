"""Learning-rate schedules and the optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jllama.config import (
    AdamWConfig,
    ConstantSchedule,
    CosineSchedule,
    Schedule,
    TrainingConfig,
    WsdSchedule,
)


def learning_rate(config: Schedule, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Step (0-based) -> learning rate of that step; the warm-up reaches the peak at its last step.

    Cosine and WSD reach their floor at the last of `steps`.
    """

    def rate(step: jax.Array) -> jax.Array:
        t = jnp.asarray(step, jnp.float32) + 1.0
        warmup = jnp.minimum(t / max(config.warmup_steps, 1), 1.0)
        match config:
            case ConstantSchedule():
                shape = 1.0
            case CosineSchedule(warmup_steps=start, floor=floor):
                done = jnp.clip((t - start) / max(steps - start, 1), 0.0, 1.0)
                shape = floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
            case WsdSchedule(decay_steps=decay, floor=floor):
                left = jnp.clip((steps - t) / decay, 0.0, 1.0)
                shape = floor + (1.0 - floor) * left
        return config.peak * warmup * shape

    return rate


def make_optimizer(config: AdamWConfig, decay: Any) -> optax.GradientTransformation:
    """Gradient -> direction, to be multiplied by minus the learning rate.

    `decay` is a tree of bools, from the declarations of the parameters. State and arithmetic are
    float32 when the parameters handed in are.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=decay),
    )


def make_schedule(config: TrainingConfig) -> Callable[[jax.Array], jax.Array]:
    """The recipe's learning rate."""
    return learning_rate(config.schedule, config.steps)
