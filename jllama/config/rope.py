"""Scalings of the rotary frequencies (RoPE): one class per rule."""

from typing import Annotated, Literal

from pydantic import Field

from jllama.config.base import PositiveFloat, PositiveInt, configclass, default, doc

LARGEST_FACTOR = 1e6  # of a scaling of RoPE: far above it frequencies are no numbers


Stretch = Annotated[float, Field(ge=1, le=LARGEST_FACTOR)]


@configclass
class NoRopeScaling:
    """Rotary frequencies as in the RoPE paper (arXiv:2104.09864)."""

    kind: Literal["none"] = doc("rotary frequencies unscaled")


@configclass
class LinearRopeScaling:
    """Position interpolation (arXiv:2306.15595): positions divided by `factor`."""

    kind: Literal["linear"] = doc("position interpolation")
    factor: Stretch = doc("positions are divided by this")


@configclass
class NtkRopeScaling:
    """Static NTK-aware scaling (bloc97, 2023): theta times alpha^(N/(N-2)), N the head's width.

    The slowest pair turns alpha times slower, the fastest as before.
    """

    kind: Literal["ntk"] = doc("NTK-aware: a larger rope_theta, whatever the length")
    alpha: Stretch = doc("the slowest pair turns so many times slower")


@configclass
class DynamicRopeScaling:
    """Dynamic NTK (emozilla, 2023): theta times (fL/L0 - (f-1))^(N/(N-2)) for a text of length L.

    L is at least L0, so that shorter texts are not scaled, and that of a request as a whole, prompt
    and new tokens: theta does not change while a text grows.
    """

    kind: Literal["dynamic"] = doc("NTK-aware by the length of each text")
    factor: Stretch = doc("f: how fast theta grows with the length")
    original_length: PositiveInt = doc("L0: positions of the training before scaling")


@configclass
class AdaptiveRopeScaling:
    """Chinese-LLaMA's rules: NTK-aware with alpha = coefficient (2L/L0 - 1) above L0 positions.

    Version 1 has L0 = 2048 and coefficient 1.1; version 2 has coefficient 1 and L0 the model's own
    maximum, with the position interpolation that it was trained with inside. L as in `dynamic`.
    """

    kind: Literal["adaptive"] = doc("Chinese-LLaMA's NTK-aware rules by the length of each text")
    original_length: PositiveInt = doc("L0: positions of the training, interpolation included")
    coefficient: Stretch = default("alpha is this times (2L/L0 - 1), above L0", 1.0)
    factor: Stretch = default("position interpolation inside: positions are divided by this", 1.0)
    growing: bool = default(
        "generate as Chinese-LLaMA's own code: L is the text until now, over a cache of keys that"
        " are not turned; no forward pass equals it",
        False,
    )


@configclass
class YarnRopeScaling:
    """YaRN (arXiv:2309.00071): slow pairs interpolated, fast ones kept, sharper attention."""

    kind: Literal["yarn"] = doc("YaRN: interpolation by bands")
    factor: Stretch = doc("slow pairs are divided by this")
    original_length: PositiveInt = doc("positions of the training before scaling")
    beta_fast: PositiveFloat = default("pairs of more turns than this in them are kept", 32.0)
    beta_slow: PositiveFloat = default("pairs of fewer turns than this are divided fully", 1.0)
    attention_factor: PositiveFloat | None = default(
        "cosine and sine are multiplied by this; null is 0.1 ln(factor) + 1", None
    )
    truncate: bool = default("the ends of the band between are rounded outwards to pairs", True)

    def __post_init__(self):
        if self.beta_fast <= self.beta_slow:
            raise ValueError("beta_fast must be above beta_slow")


@configclass
class Llama3RopeScaling:
    """Llama-3.1's banded scaling: long wavelengths divided by `factor`, short ones kept."""

    kind: Literal["llama3"] = doc("Llama-3.1's banded scaling")
    factor: Stretch = doc("long wavelengths are multiplied by this")
    low_freq_factor: PositiveFloat = doc("wavelengths above original_length/this are scaled fully")
    high_freq_factor: PositiveFloat = doc("wavelengths below original_length/this are kept")
    original_length: PositiveInt = doc("positions of the pretraining before scaling")

    def __post_init__(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")


RopeScaling = Annotated[
    NoRopeScaling
    | LinearRopeScaling
    | NtkRopeScaling
    | DynamicRopeScaling
    | AdaptiveRopeScaling
    | YarnRopeScaling
    | Llama3RopeScaling,
    Field(discriminator="kind"),
]


def _check_rope(rope: RopeScaling, max_length: int, head_dim: int, theta: float) -> None:
    if isinstance(rope, NtkRopeScaling | DynamicRopeScaling | AdaptiveRopeScaling) and head_dim < 4:
        raise ValueError(f"rope.kind={rope.kind} needs head_dim of 4 at least, not {head_dim}")
    original = getattr(rope, "original_length", 0)
    if original > max_length and not isinstance(rope, Llama3RopeScaling):
        raise ValueError(
            f"rope.original_length={original} is above max_length={max_length}: it is the length of"
            " the training before scaling, max_length the one after it"
        )
    if isinstance(rope, YarnRopeScaling) and theta <= 1:
        raise ValueError(f"rope.kind=yarn needs a rope_theta above 1, not {theta:g}")
    if isinstance(rope, YarnRopeScaling) and rope.factor * original < max_length:
        raise ValueError(
            f"rope.factor={rope.factor:g} times rope.original_length={original} does not reach"
            f" max_length={max_length}: raise the factor, or correct the original length"
        )
