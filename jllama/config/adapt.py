"""What is trained of a model: all of it, or a low-rank overlay."""

from typing import Annotated, Literal

from pydantic import Field

from jllama.config.base import Beta, Count, PositiveFloat, PositiveInt, configclass, default, doc


@configclass
class NoAdapter:
    """Every parameter is trained."""

    kind: Literal["none"] = doc("every parameter is trained")


@configclass
class LoraOverride:
    """Another rank or alpha for some of the targets."""

    match: str = doc("a target by name or path, with * and ?: down, layers.attention.*")
    layers: tuple[Count, ...] | None = default("in these layers, from 0; null is all", None)
    rank: Count | None = default("rank there, 0 for no overlay; null leaves it", None)
    alpha: PositiveFloat | None = default("alpha there; null leaves it", None)

    def __post_init__(self):
        if self.rank is None and self.alpha is None:
            raise ValueError(f"the override of {self.match} says neither rank nor alpha")


@configclass
class LoraConfig:
    """Low-rank overlay (LoRA, arXiv:2106.09685): x W + scale (x a) b, of which a and b are trained.

    Patterns name a matrix by its last word or its whole path, with * and ?.
    """

    kind: Literal["lora"] = doc("low-rank overlay over frozen parameters")
    rank: PositiveInt = doc("inner dimension of each overlay")
    alpha: PositiveFloat = doc("the overlay is scaled by alpha / rank")
    rslora: bool = default("scale by alpha / sqrt(rank) (arXiv:2312.03732)", False)
    dora: bool = default("train the columns' norms by themselves (DoRA, arXiv:2402.09353)", False)
    dropout: Beta = default(
        "inputs of the overlay dropped while training; which depends on mesh.context, and on"
        " mesh.replica where training.accumulate is above 1",
        0.0,
    )
    targets: tuple[str, ...] = default(
        "matrices with an overlay, by name or path, with * and ?",
        ("q", "k", "v", "o", "gate", "up", "down"),
    )
    full: tuple[str, ...] = default(
        "trained whole, by name or path: embedding, head, *norm, or a matrix", ()
    )
    overrides: tuple[LoraOverride, ...] = default("other ranks and alphas; the last match wins", ())
    quantize: Literal["none", "int8", "int4", "nf4"] = default(
        "the frozen matrices of the blocks are kept in this (QLoRA, arXiv:2305.14314); none is"
        " compute.dtype",
        "none",
    )
    learning_rate_ratio: PositiveFloat = default(
        "the learning rate of every b over that of all else (LoRA+, arXiv:2402.12354)", 1.0
    )
    base: str = default(
        "where training.init_from is an adapter, which is trained on: its base; empty is where the"
        " adapter says",
        "",
    )


Adapt = Annotated[NoAdapter | LoraConfig, Field(discriminator="kind")]
