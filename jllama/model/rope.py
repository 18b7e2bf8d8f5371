"""Rotary position embedding (arXiv:2104.09864), half-split: dimension i turns with i + N/2.

N is the head's width. Frequencies are made on the host in float64; what the device gets is `Turns`.
"""

import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jllama.config import (
    AdaptiveRopeScaling,
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    NoRopeScaling,
    NtkRopeScaling,
    YarnRopeScaling,
)

Lengths = int | Sequence[int] | np.ndarray | None


def depends_on_length(config: ModelConfig) -> bool:
    """Whether the frequencies are those of a text's length: kinds `dynamic` and `adaptive`."""
    return isinstance(config.rope, DynamicRopeScaling | AdaptiveRopeScaling)


def grows(config: ModelConfig) -> bool:
    """Whether generation turns all keys anew, as the text until now says, at every token."""
    return isinstance(config.rope, AdaptiveRopeScaling) and config.rope.growing


def original_length(config: ModelConfig) -> int:
    """Positions that the model was trained for before it was scaled; unscaled, all that it has."""
    match config.rope:
        case NoRopeScaling() | NtkRopeScaling():
            return config.max_length
        case LinearRopeScaling(factor=factor):
            return max(1, round(config.max_length / factor))
        case AdaptiveRopeScaling(original_length=extended, factor=factor):
            return max(1, round(extended / factor))
    return config.rope.original_length


def effective_theta(config: ModelConfig) -> float:
    """rope_theta with static NTK applied, which is nothing but another theta."""
    match config.rope:
        case NtkRopeScaling(alpha=alpha):
            return config.rope_theta * _ntk(alpha, config)
    return config.rope_theta


def inverse_frequencies(config: ModelConfig, lengths: Lengths = None) -> np.ndarray:
    """Radians per position of each pair, [N/2] float64, scaling applied.

    Args:
      lengths: for kinds that depend on it the length of the text, prompt and new tokens together;
        several, [B], give [B,N/2]. Other kinds do not look at it.

    Raises:
      ValueError: the kind depends on the length, and there is none.
    """
    theta, rope = effective_theta(config), config.rope
    match rope:
        case DynamicRopeScaling():
            ratio = np.maximum(_given(lengths, config) / rope.original_length, 1.0)
            alpha = rope.factor * ratio - (rope.factor - 1)
            return _powers(config, theta * _ntk(alpha, config))
        case AdaptiveRopeScaling():
            ratio = _given(lengths, config) / rope.original_length
            alpha = np.where(ratio > 1, (2 * ratio - 1) * rope.coefficient, 1.0)
            return _powers(config, theta * _ntk(alpha, config)) / rope.factor
    frequencies = _powers(config, theta)
    match rope:
        case NoRopeScaling() | NtkRopeScaling():
            return frequencies
        case LinearRopeScaling(factor=factor):
            return frequencies / factor
        case YarnRopeScaling():
            return _yarn(frequencies, config, rope)
        case Llama3RopeScaling():
            return _llama3(frequencies, rope)


def _powers(config, theta):
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    return np.asarray(theta, np.float64)[..., None] ** -exponents


def _ntk(alpha, config):
    """What theta is multiplied by, so that the slowest pair turns alpha times slower."""
    return alpha ** (config.head_dim / (config.head_dim - 2))


def _given(lengths, config):
    if lengths is None:
        raise ValueError(
            f"rope.kind={config.rope.kind}: with a cache, give `turns` of each text's whole length"
        )
    return np.asarray(lengths, np.float64)


def _yarn(frequencies: np.ndarray, config: ModelConfig, scaling: YarnRopeScaling) -> np.ndarray:
    def pair(turns: float) -> float:
        """The pair, a fraction, that makes so many turns within the original length."""
        ratio = math.log(scaling.original_length / (turns * 2 * math.pi))
        return config.head_dim * ratio / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper limit is that of the published code: dimensions and not pairs.
    low, high = max(low, 0), min(high, config.head_dim - 1)
    width = high - low if high != low else 0.001
    divided = np.clip((np.arange(config.head_dim // 2) - low) / width, 0.0, 1.0)
    return frequencies * (1 - divided + divided / scaling.factor)


def _llama3(frequencies: np.ndarray, scaling: Llama3RopeScaling) -> np.ndarray:
    # Turns within the original length; below low_freq_factor a pair is divided by the factor, above
    # high_freq_factor it is kept, and between the two it is blended linearly.
    turns = scaling.original_length * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def attention_factor(config: ModelConfig) -> float:
    """What cosine and sine are multiplied by: 1, but for YaRN (arXiv:2309.00071, equation 22)."""
    match config.rope:
        case YarnRopeScaling(attention_factor=None, factor=factor):
            return 0.1 * math.log(factor) + 1
        case YarnRopeScaling(attention_factor=given):
            return given
    return 1.0


@flax.struct.dataclass
class Turns:
    """Turns per position of each pair, (whole + rest) / 2^32, and what the tables are scaled by.

    Whole turns are dropped. Data, so that one compiled program serves every length and kind.

    Attributes:
      whole: [N/2] uint32, or [B,N/2] where each row has its own.
      rest: of the same shape, float32, within -1/2 and 1/2.
      scale: [] float32.
    """

    whole: jax.Array
    rest: jax.Array
    scale: jax.Array


def turns(config: ModelConfig, lengths: Lengths = None) -> Turns:
    """The turns of `inverse_frequencies(config, lengths)`, as arrays on the host; raises as it."""
    exact = np.ldexp(inverse_frequencies(config, lengths) / (2 * np.pi), 32)
    whole = np.rint(exact)
    return Turns(
        (whole % 2**32).astype(np.uint32),
        (exact - whole).astype(np.float32),
        np.float32(attention_factor(config)),
    )


def rope_tables(turns: Turns, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine for integer positions [B,T]: two arrays [B,T,1,N/2] float32, scaled.

    The angle is within 1e-6 radians of the exact one at any position. A float32 product of position
    and frequency is off by 1e-4 at position 2,000 and by 3e-3 at 131,071; so whole turns are
    dropped first, in integers, which overflow exactly as an angle does.
    """
    whole, rest = (jnp.asarray(x)[..., None, None, :] for x in (turns.whole, turns.rest))
    positions = jnp.asarray(positions)[..., None, None]
    fraction = jax.lax.bitcast_convert_type(positions.astype(jnp.uint32) * whole, jnp.int32)
    angles = (fraction.astype(jnp.float32) + positions.astype(jnp.float32) * rest) * (
        2 * np.pi * 2.0**-32
    )
    return jnp.cos(angles) * turns.scale, jnp.sin(angles) * turns.scale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns x [B, T, heads, head_dim] by the tables, in float32; keeps x's dtype."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
