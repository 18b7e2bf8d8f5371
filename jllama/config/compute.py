"""How the function is computed: dtypes, rematerialisation, attention kernels."""

from typing import Annotated, Literal

from pydantic import Field

from jllama.config.base import PositiveInt, configclass, default, doc


@configclass
class AutoAttention:
    """Splash on TPU, cuDNN on GPU where rows are one segment, blockwise elsewhere."""

    kind: Literal["auto"] = doc("the best kernel for the platform")
    block: PositiveInt = default("queries and keys at a time", 512)


@configclass
class ReferenceAttention:
    """All scores of a row at once: memory grows with the square of the length."""

    kind: Literal["reference"] = doc("all scores at once, for tests and comparisons")


@configclass
class BlockwiseAttention:
    """XLA, with an online softmax over blocks (arXiv:2205.14135): memory grows with the length."""

    kind: Literal["blockwise"] = doc("XLA, block by block: any platform, any segments")
    block: PositiveInt = default("queries and keys at a time", 512)


@configclass
class CudnnAttention:
    """cuDNN's flash attention; it knows no segments, so data.document_mask must be off."""

    kind: Literal["cudnn"] = doc("cuDNN flash attention on NVIDIA GPUs, without segments")


@configclass
class SplashAttention:
    """Splash attention, jax's Pallas kernel for TPU, with segments."""

    kind: Literal["splash"] = doc("Pallas kernel for TPU")
    block: PositiveInt = default("queries and keys at a time; a multiple of 128", 512)


AttentionConfig = Annotated[
    AutoAttention | ReferenceAttention | BlockwiseAttention | CudnnAttention | SplashAttention,
    Field(discriminator="kind"),
]


@configclass
class ComputeConfig:
    """How the function is computed; the architecture does not depend on it.

    Norms, softmax, logits, loss and optimizer state are float32 whatever is chosen here.
    """

    dtype: Literal["float32", "bfloat16"] = doc(
        "activations and matrix multiplications; TPUs and recent GPUs round the factors of float32"
        " products unless JAX_DEFAULT_MATMUL_PRECISION=highest"
    )
    param_dtype: Literal["float32", "bfloat16"] = default(
        "stored parameters; bfloat16 loses updates below 1/256 of a weight", "float32"
    )
    remat: Literal["none", "dots", "attention", "full", "offload"] = default(
        "the backward pass recomputes: none = nothing; dots = all but products and attention;"
        " attention = all but attention; full = each block; offload = each block, whose input"
        " waits in the host's memory",
        "none",
    )
    attention: AttentionConfig = default("attention without a cache", AutoAttention(kind="auto"))
    loss_block: PositiveInt = default(
        "tokens of a device whose logits exist at a time in the loss", 1024
    )
    scan_unroll: PositiveInt = default(
        "layers per iteration of the layer loop: more compiles longer and may run faster", 1
    )
