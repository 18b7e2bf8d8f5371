"""Config of the computation: dtypes, rematerialisation, attention kernels."""

from typing import Annotated, Literal

from pydantic import Field

from jllama.config.base import Options, PositiveInt, configclass, default, doc

_BLOCK = "queries and keys per block; null means 64 on CPUs and 512 elsewhere"


@configclass
class AutoAttention:
    """Splash on TPU, cuDNN on GPU if each row is one segment, blockwise otherwise."""

    kind: Literal["auto"] = doc("the best kernel for the platform")
    block: PositiveInt | None = default(_BLOCK, None)


@configclass
class ReferenceAttention:
    """Computes all scores of a row at once: memory grows with the square of the length."""

    kind: Literal["reference"] = doc("computes all scores at once, for tests and comparisons")


@configclass
class BlockwiseAttention:
    """XLA, with an online softmax over blocks (arXiv:2205.14135): memory grows with the length."""

    kind: Literal["blockwise"] = doc("XLA, block by block: any platform, any segments")
    block: PositiveInt | None = default(_BLOCK, None)


@configclass
class CudnnAttention:
    """cuDNN's flash attention, which has no segments: data.document_mask must be false."""

    kind: Literal["cudnn"] = doc("cuDNN flash attention on NVIDIA GPUs, without segments")


@configclass
class SplashAttention:
    """Splash attention: JAX's Pallas kernel for TPUs, with segments."""

    kind: Literal["splash"] = doc("Pallas kernel for TPUs, with segments")
    block: PositiveInt = default("queries and keys per block; a multiple of 128", 512)


AttentionConfig = Annotated[
    AutoAttention | ReferenceAttention | BlockwiseAttention | CudnnAttention | SplashAttention,
    Field(discriminator="kind"),
]


@configclass
class XlaConfig:
    """Options of XLA by platform, on top of those of `jllama.train.compiler`."""

    tpu: Options = default(
        "options of the TPU's compiler, on top of its defaults here; null takes one away", ()
    )
    gpu: Options = default("options of the compiler for GPUs", ())
    cpu: Options = default("options of the compiler for CPUs", ())


@configclass
class ComputeConfig:
    """How the model's function is computed; the architecture does not depend on it.

    Norms, softmax, logits, loss and optimizer state are always float32.
    """

    dtype: Literal["float32", "bfloat16"] = doc(
        "dtype of activations and matrix products; TPUs and recent GPUs round the factors of"
        " float32 products unless JAX_DEFAULT_MATMUL_PRECISION=highest"
    )
    param_dtype: Literal["float32", "bfloat16"] = default(
        "dtype of stored parameters; bfloat16 loses updates below 1/256 of a weight", "float32"
    )
    remat: Literal["none", "dots", "attention", "full", "offload"] = default(
        "what the backward pass recomputes: none = nothing; dots = all but matrix products and"
        " attention; attention = all but attention; full = each block; offload = each block, with"
        " its input in host memory",
        "none",
    )
    attention: AttentionConfig = default(
        "kernel of attention without a cache", AutoAttention(kind="auto")
    )
    loss_block: PositiveInt | None = default(
        "tokens per device whose logits the loss computes at a time; null means 512 on CPUs and"
        " 1024 elsewhere",
        None,
    )
    scan_unroll: PositiveInt = default(
        "layers per iteration of the loop over layers; more compile longer and may run faster", 1
    )
    xla: XlaConfig = default(
        "options with which XLA compiles the step and the evaluation", XlaConfig()
    )
