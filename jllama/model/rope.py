"""Rotary position embedding (arXiv:2104.09864), half-split: dimension i is rotated with i + N/2.

N is the head's width. The host computes frequencies in float64 and gives the device `Turns`.
"""

import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
from jllama.parallel.context import platform

Lengths = int | Sequence[int] | np.ndarray | None


def depends_on_length(config: ModelConfig) -> bool:
    """Whether the frequencies depend on a text's length: for the kinds `dynamic` and `adaptive`."""
    return isinstance(config.rope, DynamicRopeScaling | AdaptiveRopeScaling)


def grows(config: ModelConfig) -> bool:
    """Whether generation rotates all keys anew at every token, for the text's length so far."""
    return isinstance(config.rope, AdaptiveRopeScaling) and config.rope.growing


def original_length(config: ModelConfig) -> int:
    """The positions that the model was trained for before its RoPE was scaled."""
    match config.rope:
        case NoRopeScaling() | NtkRopeScaling():
            return config.max_length
        case LinearRopeScaling(factor=factor):
            return max(1, round(config.max_length / factor))
        case AdaptiveRopeScaling(original_length=extended, factor=factor):
            return max(1, round(extended / factor))
    return config.rope.original_length


def effective_theta(config: ModelConfig) -> float:
    """rope_theta, multiplied as static NTK does: NTK is another theta and nothing else."""
    match config.rope:
        case NtkRopeScaling(alpha=alpha):
            return config.rope_theta * _ntk(alpha, config)
    return config.rope_theta


def inverse_frequencies(config: ModelConfig, lengths: Lengths = None) -> np.ndarray:
    """Radians per position of each pair of dimensions, scaled: [N/2] float64.

    Args:
      lengths: the length of the text, prompt and new tokens together, for kinds that depend on it;
        other kinds ignore it. Several lengths [B] give [B,N/2].

    Raises:
      ValueError: the kind depends on the length, and `lengths` is None.
    """
    theta, rope = effective_theta(config), config.rope
    match rope:
        case DynamicRopeScaling():
            ratio = np.maximum(_checked(lengths, config) / rope.original_length, 1.0)
            alpha = rope.factor * ratio - (rope.factor - 1)
            return _powers(config, theta * _ntk(alpha, config))
        case AdaptiveRopeScaling():
            ratio = _checked(lengths, config) / rope.original_length
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
    """The factor of theta with which the slowest pair turns alpha times slower."""
    return alpha ** (config.head_dim / (config.head_dim - 2))


def _checked(lengths, config):
    if lengths is None:
        raise ValueError(
            f"rope.kind={config.rope.kind}: with a cache, give `turns` of each text's whole length"
        )
    return np.asarray(lengths, np.float64)


def _yarn(frequencies: np.ndarray, config: ModelConfig, scaling: YarnRopeScaling) -> np.ndarray:
    def pair(turns: float) -> float:
        """The fractional index of the pair that makes `turns` turns in the original length."""
        ratio = math.log(scaling.original_length / (turns * 2 * math.pi))
        return config.head_dim * ratio / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The published code limits `high` by the number of dimensions, not of pairs.
    low, high = max(low, 0), min(high, config.head_dim - 1)
    width = high - low if high != low else 0.001
    divided = np.clip((np.arange(config.head_dim // 2) - low) / width, 0.0, 1.0)
    return frequencies * (1 - divided + divided / scaling.factor)


def _llama3(frequencies: np.ndarray, scaling: Llama3RopeScaling) -> np.ndarray:
    # A pair that turns fewer than low_freq_factor times within the original length is divided by
    # the factor, one that turns more than high_freq_factor times is not, and between the two the
    # frequencies are interpolated linearly.
    turns = scaling.original_length * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unscaled = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (unscaled + (1 - unscaled) / scaling.factor)


def attention_factor(config: ModelConfig) -> float:
    """The factor of cosine and sine: 1, except for YaRN (arXiv:2309.00071, equation 22)."""
    match config.rope:
        case YarnRopeScaling(attention_factor=None, factor=factor):
            return 0.1 * math.log(factor) + 1
        case YarnRopeScaling(attention_factor=given):
            return given
    return 1.0


@flax.struct.dataclass
class Turns:
    """Turns per position of each pair, (whole + rest) / 2^32 modulo 1, and the tables' factor.

    They are arrays, so that one compiled program serves every length and kind.

    Attributes:
      whole: [N/2] uint32, or [B,N/2] with turns of its own for each row.
      rest: float32 of the same shape, from -1/2 to 1/2.
      scale: [] float32, the factor of cosine and sine.
    """

    whole: jax.Array
    rest: jax.Array
    scale: jax.Array


def turns(config: ModelConfig, lengths: Lengths = None) -> Turns:
    """`inverse_frequencies(config, lengths)` as `Turns` of NumPy arrays; raises the same errors."""
    exact = np.ldexp(inverse_frequencies(config, lengths) / (2 * np.pi), 32)
    whole = np.rint(exact)
    return Turns(
        (whole % 2**32).astype(np.uint32),
        (exact - whole).astype(np.float32),
        np.float32(attention_factor(config)),
    )


def rope_tables(turns: Turns, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine for integer positions [B,T]: two arrays [B,T,1,N/2] float32, scaled.

    Angles are within 1e-6 radians of the exact ones at any position. A float32 product of position
    and frequency would be off by 1e-4 at position 2,000 and by 3e-3 at 131,071. Here the product is
    computed in uint32 turns of 2^-32, whose overflow drops whole turns exactly.
    """
    whole, rest = (jnp.asarray(x)[..., None, None, :] for x in (turns.whole, turns.rest))
    positions = jnp.asarray(positions)[..., None, None]
    fraction = lax.bitcast_convert_type(positions.astype(jnp.uint32) * whole, jnp.int32)
    angles = (fraction.astype(jnp.float32) + positions.astype(jnp.float32) * rest) * (
        2 * np.pi * 2.0**-32
    )
    return jnp.cos(angles) * turns.scale, jnp.sin(angles) * turns.scale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B,T,heads,N] by the tables, in float32; returns the dtype of x.

    On TPUs the tables have no gradient.
    """
    if platform() == "tpu":
        return _rotated_by_product(x, cos, sin)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def _rotated_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`apply_rope` of finite values, which a matrix of 0, 1 and -1 brings to their places.

    Half a head does not fill a vector register of the TPU, and to move halves costs far more than
    this product, which is exact.
    """
    N = x.shape[-1]
    turn = np.kron([[0, 1], [-1, 0]], np.eye(N // 2))  # (a, b) -> (-b, a)
    turned = jnp.einsum(
        "BTHN,NM->BTHM",
        x,
        jnp.asarray(turn, x.dtype),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    cos, sin = (jnp.concatenate([table, table], axis=-1) for table in (cos, sin))
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def _rotated_fwd(x, cos, sin):
    return _rotated_by_product(x, cos, sin), (cos, sin)


def _rotated_bwd(tables, d):
    # The transpose of a rotation turns back: in one step too, so d is rounded once.
    cos, sin = tables
    return _rotated_by_product(d, cos, -sin), None, None


_rotated_by_product.defvjp(_rotated_fwd, _rotated_bwd)
