"""Config of the trained parameters: all of a model, or a low-rank overlay."""

from typing import Annotated, Literal

from pydantic import Field

from jllama.config.base import Beta, Count, PositiveFloat, PositiveInt, configclass, default, doc


@configclass
class NoAdapter:
    """Every parameter is trained."""

    kind: Literal["none"] = doc("every parameter is trained")


@configclass
class LoraOverride:
    """Changes rank or alpha for some of the targets."""

    match: str = doc("pattern of targets, by name or path, with * and ?: down, layers.attention.*")
    layers: tuple[Count, ...] | None = default("indices of layers, from 0; null means all", None)
    rank: Count | None = default("rank of these targets, 0 for no overlay; null leaves it", None)
    alpha: PositiveFloat | None = default("alpha of these targets; null leaves it", None)

    def __post_init__(self):
        if self.rank is None and self.alpha is None:
            raise ValueError(f"the override of {self.match} sets neither rank nor alpha")


@configclass
class LoraConfig:
    """Low-rank overlay (LoRA, arXiv:2106.09685): x W + scale (x a) b; only a and b are trained.

    A pattern names a matrix by the last word of its path or by the whole path, with * and ?.
    """

    kind: Literal["lora"] = doc("low-rank overlay over frozen parameters")
    rank: PositiveInt = doc("inner dimension of each overlay")
    alpha: PositiveFloat = doc("the overlay is scaled by alpha / rank")
    rslora: bool = default("scale by alpha / sqrt(rank) (arXiv:2312.03732)", False)
    dora: bool = default(
        "train the norms of the columns separately (DoRA, arXiv:2402.09353)", False
    )
    dropout: Beta = default(
        "share of the overlay's inputs that is dropped in training; the mask depends on"
        " mesh.context, and on mesh.replica if training.accumulate is above 1",
        0.0,
    )
    targets: tuple[str, ...] = default(
        "patterns of the matrices with an overlay",
        ("q", "k", "v", "o", "gate", "up", "down"),
    )
    full: tuple[str, ...] = default(
        "patterns of parameters that are trained whole: embedding, head, *norm, or a matrix", ()
    )
    overrides: tuple[LoraOverride, ...] = default(
        "targets with another rank or alpha; the last match wins", ()
    )
    quantize: Literal["none", "int8", "int4", "nf4"] = default(
        "storage of the blocks' frozen matrices (QLoRA, arXiv:2305.14314); none means"
        " compute.dtype",
        "none",
    )
    learning_rate_ratio: PositiveFloat = default(
        "learning rate of every b, over the rate of everything else (LoRA+, arXiv:2402.12354)", 1.0
    )
    base: str = default(
        "the base model if training.init_from is an adapter to train further; empty means the one"
        " that the adapter names",
        "",
    )


Adapt = Annotated[NoAdapter | LoraConfig, Field(discriminator="kind")]
