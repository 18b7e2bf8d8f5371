"""Config of the training: optimizer, learning rate, evaluation, checkpoints."""

import re
from typing import Annotated, Literal

from pydantic import Field

from jllama.config.base import (
    Beta,
    Count,
    Fraction,
    Nonnegative,
    PositiveFloat,
    PositiveInt,
    configclass,
    default,
    doc,
)


@configclass
class AdamWConfig:
    """AdamW (arXiv:1711.05101) with float32 state, after clipping by the global norm."""

    kind: Literal["adamw"] = doc("Adam with decoupled weight decay")
    beta1: Beta = doc("decay of the first moment")
    beta2: Beta = doc("decay of the second moment")
    eps: PositiveFloat = doc("term added to the root of the second moment")
    weight_decay: Nonnegative = doc("decoupled decay of matrices, times the learning rate")
    clip_norm: PositiveFloat | None = doc("largest global norm of the gradient; null means any")


@configclass
class MuonConfig:
    """Muon (Jordan et al., 2024) for the blocks' matrices, AdamW for the rest.

    Its updates have the root mean square of AdamW's (arXiv:2502.16982, equation 4), so that it uses
    the same learning rate and weight decay.
    """

    kind: Literal["muon"] = doc(
        "orthogonalised momentum for the blocks' matrices, AdamW for the rest"
    )
    momentum: Beta = doc("decay of the matrices' Nesterov momentum")
    beta1: Beta = doc("AdamW: decay of the first moment")
    beta2: Beta = doc("AdamW: decay of the second moment")
    eps: PositiveFloat = doc("AdamW: term added to the root of the second moment")
    weight_decay: Nonnegative = doc("decoupled decay of matrices, times the learning rate")
    clip_norm: PositiveFloat | None = doc("largest global norm of the gradient; null means any")


Optimizer = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


@configclass
class CosineSchedule:
    """A linear warm-up, then half a cosine down to `floor` times the peak."""

    kind: Literal["cosine"] = doc("warm-up, then half a cosine")
    peak: PositiveFloat = doc("learning rate after the warm-up")
    warmup_steps: Count = doc("steps of linear warm-up")
    floor: Fraction = doc("last learning rate over the peak")


@configclass
class ConstantSchedule:
    """A linear warm-up, then a constant rate."""

    kind: Literal["constant"] = doc("warm-up, then a constant rate")
    peak: PositiveFloat = doc("learning rate after the warm-up")
    warmup_steps: Count = doc("steps of linear warm-up")


@configclass
class WsdSchedule:
    """Warm-up, stable, decay (arXiv:2404.06395): the decay is linear to `floor` times the peak."""

    kind: Literal["wsd"] = doc("warm-up, a constant rate, then a linear decay")
    peak: PositiveFloat = doc("learning rate after the warm-up")
    warmup_steps: Count = doc("steps of linear warm-up")
    decay_steps: PositiveInt = doc("steps of the decay at the end")
    floor: Fraction = doc("last learning rate over the peak")


Schedule = Annotated[CosineSchedule | ConstantSchedule | WsdSchedule, Field(discriminator="kind")]


@configclass
class TrainingConfig:
    """How the parameters are optimised."""

    steps: PositiveInt = doc("optimizer steps of the whole run")
    batch_size: PositiveInt = doc("rows per step, over all devices")
    accumulate: PositiveInt = default("microbatches into which a step is split", 1)
    init_from: str = default(
        "initial parameters: a run, one of its steps, or the folder of a model in any format; with"
        " adapt.kind=lora also an adapter; empty means random ones",
        "",
    )
    resume_from: str = default(
        "RUN@STEP, the step of another run from whose parameters and optimizer state this run goes"
        " on as step STEP; init_from is then read for the base of an overlay alone; empty means"
        " none",
        "",
    )
    gradient_dtype: Literal["float32", "bfloat16"] = default(
        "dtype in which devices send the gradients of matrices and of the head to each other; a"
        " device sums its own in the dtype of the parameters",
        "float32",
    )
    z_loss: Nonnegative = default("weight of log(Z)^2 in the loss", 0.0)
    optimizer: Optimizer = doc("optimizer")
    schedule: Schedule = doc("learning rate")

    def __post_init__(self):
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} must divide batch_size={self.batch_size}"
            )
        if self.resume_from and not re.fullmatch(r".+@\d+", self.resume_from):
            raise ValueError(f"resume_from={self.resume_from}: expected RUN@STEP")
        warmup = self.schedule.warmup_steps + getattr(self.schedule, "decay_steps", 0)
        if warmup > self.steps:
            raise ValueError(
                f"schedule: warm-up and decay take {warmup} steps, more than steps={self.steps}"
            )


@configclass
class EvalConfig:
    """Evaluation on the held-out sources."""

    every: Count = default("steps between evaluations; 0 means only at the end", 0)
    batch_size: PositiveInt = default("rows per batch", 16)
    max_rows: Count = default("rows per evaluation during training; 0 means all", 0)
    stride: Count = default(
        "at the end: tokens to score per row, after the others as context; 0 means all", 0
    )
    compare_xz: bool = default(
        "at the end: also compress the held-out text with xz -9, to compare", False
    )


@configclass
class CheckpointConfig:
    """When checkpoints are saved, and how many are kept."""

    every: Count = default("steps between checkpoints; 0 means only at the end", 1000)
    keep: PositiveInt | None = default("number of newest checkpoints to keep; null means all", 2)
