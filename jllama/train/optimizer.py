"""Learning-rate schedules and the optimizer."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jllama.config import (
    AdamWConfig,
    ConstantSchedule,
    CosineSchedule,
    MuonConfig,
    Optimizer,
    Schedule,
    WsdSchedule,
)
from jllama.model.llama import ParamSpec


def learning_rate(config: Schedule, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Returns the schedule: step, counted from 0 -> learning rate of that step, float32.

    The warm-up reaches the peak at its last step. Cosine and WSD reach their floor at the last of
    `steps`.
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


def make_optimizer(config: Optimizer, specs: Any) -> optax.GradientTransformation:
    """Returns what maps a clipped gradient to a direction: minus the rate times it is the update.

    State and arithmetic are float32 when the parameters given to it are.

    Args:
      specs: the parameters' `ParamSpec`s. Each says, from where the parameter is declared, whether
        it decays and whether it is a matrix.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=jnp.float32)
    match config:
        case AdamWConfig():
            direction = adam
        case MuonConfig(momentum=momentum):
            direction = optax.partition(
                {True: _muon(momentum, specs), False: adam},
                jax.tree.map(lambda s: s.inputs > 0, specs),
            )
    return optax.chain(
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=jax.tree.map(lambda s: s.decay, specs)),
    )


def _muon(momentum: float, specs: Any) -> optax.GradientTransformation:
    """Momentum, orthogonalised, times 0.2 sqrt(max(inputs, outputs)): the usual size of AdamW's
    updates (arXiv:2502.16982, equation 4).
    """

    def split(dimensions: Sequence[int], spec: ParamSpec) -> tuple[tuple[int, ...], ...]:
        """Those of the inputs, and of the outputs; each layer's matrix is orthogonalised alone."""
        first = int(spec.axes[0] == "layers")
        last = first + spec.inputs
        return tuple(dimensions[first:last]), tuple(dimensions[last:])

    def dimensions(spec: ParamSpec) -> optax.contrib.MuonDimensionNumbers:
        return optax.contrib.MuonDimensionNumbers(*split(range(len(spec.axes)), spec))

    def size(spec: ParamSpec) -> float:
        return 0.2 * max(map(math.prod, split(spec.shape, spec))) ** 0.5

    def of_matrices(f: Callable[[ParamSpec], Any]) -> Any:
        return jax.tree.map(lambda s: f(s) if s.inputs else optax.MaskedNode(), specs)

    sizes = of_matrices(size)
    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=momentum,
            mu_dtype=jnp.float32,
            weight_dimension_numbers=of_matrices(dimensions),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, sizes)),
    )
