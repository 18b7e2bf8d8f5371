"""Config of the scaling of rotary frequencies (RoPE): one class for each rule."""

from typing import Annotated, Literal

from pydantic import Field

from jllama.config.base import PositiveFloat, PositiveInt, configclass, default, doc

LARGEST_FACTOR = 1e6  # far above it, frequencies are not finite
Stretch = Annotated[float, Field(ge=1, le=LARGEST_FACTOR)]


@configclass
class NoRopeScaling:
    """The frequencies of the RoPE paper (arXiv:2104.09864)."""

    kind: Literal["none"] = doc("rotary frequencies are not scaled")


@configclass
class LinearRopeScaling:
    """Position interpolation (arXiv:2306.15595): divides positions by `factor`."""

    kind: Literal["linear"] = doc("position interpolation")
    factor: Stretch = doc("positions are divided by this")


@configclass
class NtkRopeScaling:
    """Static NTK-aware scaling (bloc97, 2023): multiplies theta by alpha^(N/(N-2)).

    N is the width of a head. The slowest pair rotates alpha times slower, the fastest as before.
    """

    kind: Literal["ntk"] = doc("NTK-aware: a larger rope_theta for every length")
    alpha: Stretch = doc("the slowest pair rotates this many times slower")


@configclass
class DynamicRopeScaling:
    """Dynamic NTK (emozilla, 2023): multiplies theta by (fL/L0 - (f-1))^(N/(N-2)).

    N is the width of a head, and L is the length of the text, or L0 if the text is shorter and so
    not scaled. In generation L counts the prompt and all new tokens, so that theta does not change
    while the text grows.
    """

    kind: Literal["dynamic"] = doc("NTK-aware: rope_theta grows with the length of the text")
    factor: Stretch = doc("f: how fast theta grows with the length")
    original_length: PositiveInt = doc("L0: length of the training before scaling")


@configclass
class AdaptiveRopeScaling:
    """Chinese-LLaMA's rules: NTK-aware with alpha = coefficient (2L/L0 - 1) above L0 positions.

    L is defined as in `DynamicRopeScaling`. Version 1 has L0 = 2048 and coefficient 1.1. Version 2
    has coefficient 1 and the model's own maximum as L0, on top of the position interpolation that
    the model was trained with.
    """

    kind: Literal["adaptive"] = doc("Chinese-LLaMA's NTK-aware rules, by the length of the text")
    original_length: PositiveInt = doc("L0: length of the training, with interpolation")
    coefficient: Stretch = default("above L0, alpha is this times (2L/L0 - 1)", 1.0)
    factor: Stretch = default("position interpolation: positions are divided by this", 1.0)
    growing: bool = default(
        "generate as Chinese-LLaMA's own code: L is the length of the text so far, and the cache"
        " holds keys before rotation; no single forward pass gives the same",
        False,
    )


@configclass
class YarnRopeScaling:
    """YaRN (arXiv:2309.00071): interpolates slow pairs, keeps fast ones, sharpens attention."""

    kind: Literal["yarn"] = doc("YaRN: interpolation by bands of frequencies")
    factor: Stretch = doc("frequencies of slow pairs are divided by this")
    original_length: PositiveInt = doc("length of the training before scaling")
    beta_fast: PositiveFloat = default(
        "pairs with more rotations than this in original_length are kept", 32.0
    )
    beta_slow: PositiveFloat = default(
        "pairs with fewer rotations than this are divided fully", 1.0
    )
    attention_factor: PositiveFloat | None = default(
        "cosine and sine are multiplied by this; null means 0.1 ln(factor) + 1", None
    )
    truncate: bool = default("round the limits of the band between outwards to whole pairs", True)

    def __post_init__(self):
        if self.beta_fast <= self.beta_slow:
            raise ValueError("beta_fast must be above beta_slow")


@configclass
class Llama3RopeScaling:
    """Llama-3.1's banded scaling: multiplies long wavelengths by `factor`, keeps short ones."""

    kind: Literal["llama3"] = doc("Llama-3.1's banded scaling")
    factor: Stretch = doc("long wavelengths are multiplied by this")
    low_freq_factor: PositiveFloat = doc("wavelengths above original_length/this are scaled fully")
    high_freq_factor: PositiveFloat = doc("wavelengths below original_length/this are kept")
    original_length: PositiveInt = doc("length of the pretraining before scaling")

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


def check_rope(rope: RopeScaling, max_length: int, head_dim: int, theta: float) -> None:
    """Raises ValueError if the scaling does not fit the model."""
    if isinstance(rope, NtkRopeScaling | DynamicRopeScaling | AdaptiveRopeScaling) and head_dim < 4:
        raise ValueError(f"rope.kind={rope.kind} needs a head_dim of at least 4, not {head_dim}")
    original = getattr(rope, "original_length", 0)
    if original > max_length and not isinstance(rope, Llama3RopeScaling):
        raise ValueError(
            f"rope.original_length={original} is above max_length={max_length}: the former is the"
            " length of the training before scaling, the latter the length after it"
        )
    if isinstance(rope, YarnRopeScaling) and theta <= 1:
        raise ValueError(f"rope.kind=yarn needs a rope_theta above 1, not {theta:g}")
    if isinstance(rope, YarnRopeScaling) and rope.factor * original < max_length:
        raise ValueError(
            f"rope.factor={rope.factor:g} times rope.original_length={original} does not reach"
            f" max_length={max_length}: raise the factor, or correct the original length"
        )
