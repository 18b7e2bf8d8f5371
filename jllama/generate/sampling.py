"""From logits to the next token: penalty, temperature, top-k, top-p, and the draw itself.

Every setting is an array with one value per row, so that requests with different settings share a
batch and a program. B rows, V vocabulary.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jllama.config import SampleConfig
from jllama.errors import UserError

_DEFAULT = SampleConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw the tokens of one request; raises `UserError` for an impossible value.

    The defaults, which are those of a recipe's sample, draw from the model's own distribution.

    Attributes:
      temperature: logits are divided by it; 0 is greedy.
      top_k: keep the K likeliest tokens; 0 keeps all.
      top_p: keep the fewest likeliest tokens whose probabilities reach this (arXiv:1904.09751),
        after temperature and top-k; 1 keeps all.
      repetition_penalty: for tokens in the prompt or already generated (arXiv:1909.05858, 4.1),
        positive logits are divided by it and negative ones multiplied; 1 is off.
    """

    temperature: float = _DEFAULT.temperature
    top_k: int = _DEFAULT.top_k
    top_p: float = _DEFAULT.top_p
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, holds, wanted in (
            ("temperature", self.temperature >= 0, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "0 (off) or a count"),
            ("top_p", 0 <= self.top_p <= 1, "from 0 to 1 (off)"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 is off"),
        ):
            value = getattr(self, name)
            if not (holds and math.isfinite(value)):  # a NaN fails every comparison
                raise UserError(f"{name}={value}: must be {wanted}")


@flax.struct.dataclass
class SamplingArrays:
    """The `Sampling` of each row, as arrays [B]."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array


def stack(rows: list[Sampling]) -> SamplingArrays:
    """`SamplingArrays` with one row per request."""
    return SamplingArrays(
        temperature=np.asarray([r.temperature for r in rows], np.float32),
        top_k=np.asarray([min(r.top_k, 2**31 - 1) for r in rows], np.int32),
        top_p=np.asarray([r.top_p for r in rows], np.float32),
        repetition_penalty=np.asarray([r.repetition_penalty for r in rows], np.float32),
    )


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Makes the seen tokens less likely; logits and seen (bool) are [B,V], penalty [B]."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _cut(logits: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Sets to -inf all but the fewest largest logits whose weights sum to `target` [B].

    Equal logits are all kept or all cut, and the largest is always kept. The threshold is found by
    bisecting the bits of the float32, which is exact after 32 sums over the row; sorting the row
    takes 25 times as long on a CPU.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        above = jnp.sum(jnp.where(order >= middle[:, None], weights, 0.0), axis=-1)
        reached = above >= target
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    limits = jnp.iinfo(jnp.int32)
    low, high = jnp.full_like(target, limits.min, jnp.int32), jnp.max(order, axis=-1) + 1
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(order >= low[:, None], logits, -jnp.inf)


def keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Sets all but the `top_k` [B] largest logits [B,V] to -inf; 0 keeps all."""
    count = jnp.where(top_k == 0, logits.shape[-1], top_k)
    return _cut(logits, jnp.ones_like(logits), count.astype(jnp.float32))


def keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets all logits [B,V] outside of the nucleus `top_p` [B] to -inf; 1 keeps all."""
    nucleus = _cut(logits, jax.nn.softmax(logits, axis=-1), top_p)
    return jnp.where((top_p < 1)[:, None], nucleus, logits)


def sample(
    keys: jax.Array, logits: jax.Array, seen: jax.Array, settings: SamplingArrays
) -> jax.Array:
    """Draws the next token of each row.

    Args:
      keys: [B] random keys; a row depends on its own key, logits and settings and on no other row.
      logits: [B,V] float32.
      seen: [B,V] bool, the tokens in the row's prompt or already generated.

    Returns:
      [B] int32.
    """
    logits = penalise(logits, seen, settings.repetition_penalty)
    greedy = jnp.argmax(logits, axis=-1)

    def draw():
        warm = settings.temperature > 0
        # At most 0 before the division, so that no temperature makes it overflow.
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled = scaled / jnp.where(warm, settings.temperature, 1.0)[:, None]
        cut = keep_top_p(keep_top_k(scaled, settings.top_k), settings.top_p)
        # The Gumbel trick: the argmax of logits plus this noise is a draw from their softmax.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, cut.shape[1:], jnp.float32))(keys)
        return jnp.where(warm, jnp.argmax(cut + noise, axis=-1), greedy)

    drawn = jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda: greedy)
    return drawn.astype(jnp.int32)
