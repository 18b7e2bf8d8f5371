"""Rotary position embedding (arXiv:2104.09864), half-split: dimension i turns with i + N/2."""

import jax
import jax.numpy as jnp
import numpy as np

from jllama.config import LinearRopeScaling, Llama3RopeScaling, ModelConfig, NoRopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair, [head_dim/2] float64, scaling applied."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    match config.rope:
        case NoRopeScaling():
            return frequencies
        case LinearRopeScaling(factor=factor):
            return frequencies / factor
        case Llama3RopeScaling():
            return _llama3(frequencies, config.rope)


def _llama3(frequencies: np.ndarray, scaling: Llama3RopeScaling) -> np.ndarray:
    # Turns within the original length; below low_freq_factor a pair is divided by the factor, above
    # high_freq_factor it is kept, and between the two it is blended linearly.
    turns = scaling.original_length * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine for integer positions [B, T]: two arrays [B, T, 1, head_dim/2] float32.

    The angle is within 1e-6 radians of the exact one at any position. A float32 product of position
    and frequency is off by 1e-4 at position 2,000 and by 3e-3 at 131,071; so whole turns are
    dropped first, in integers, which overflow exactly as an angle does.
    """
    # Turns per position as a 32-bit fraction, and in float32 what that rounds off.
    turns = np.ldexp(inverse_frequencies(config) / (2 * np.pi), 32)
    whole = np.rint(turns)
    rest = jnp.asarray(turns - whole, jnp.float32)
    whole = jnp.asarray((whole % 2**32).astype(np.uint32))
    positions = positions[..., None, None]
    fraction = jax.lax.bitcast_convert_type(positions.astype(jnp.uint32) * whole, jnp.int32)
    angles = (fraction.astype(jnp.float32) + positions.astype(jnp.float32) * rest) * (
        2 * np.pi * 2.0**-32
    )
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns x [B, T, heads, head_dim] by the tables, in float32; keeps x's dtype."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
