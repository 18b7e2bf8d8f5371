"""The architecture."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from jllama.config.base import PositiveFloat, PositiveInt, configclass, default, doc
from jllama.config.rope import RopeScaling, _check_rope


@configclass
class TruncatedNormalInit:
    """Normal, cut at two standard deviations; GPT-2's residual scaling if asked for."""

    kind: Literal["truncated_normal"] = doc("normal, cut at two standard deviations")
    std: PositiveFloat = doc("standard deviation of every matrix")
    scale_residual: bool = doc("divide the attention and MLP outputs' std by sqrt(2 num_layers)")


@configclass
class FanInInit:
    """Normal with std 1/sqrt(inputs) for matrices; embeddings at `embedding_std`."""

    kind: Literal["fan_in"] = doc("truncated normal with std 1/sqrt(inputs)")
    embedding_std: PositiveFloat = doc("standard deviation of embedding and head")
    scale_residual: bool = doc("divide the attention and MLP outputs' std by sqrt(2 num_layers)")


Init = Annotated[TruncatedNormalInit | FanInInit, Field(discriminator="kind")]


@configclass
class ModelConfig:
    """The architecture: everything that decides the function from tokens and parameters to logits.

    Hashable, so that it serves as a static attribute of the modules.
    """

    vocab_size: PositiveInt = doc("token ids; rows of the embedding and of the head")
    hidden_dim: PositiveInt = doc("width of the residual stream")
    num_layers: PositiveInt = doc("transformer blocks")
    num_heads: PositiveInt = doc("query heads")
    num_kv_heads: PositiveInt = doc("key/value heads; divides num_heads")
    head_dim: PositiveInt = doc("width of one head; even")
    ffn_dim: PositiveInt = doc("inner width of the SwiGLU feed-forward")
    max_length: PositiveInt = doc("positions the model is trained for")
    rms_norm_eps: PositiveFloat = doc("epsilon inside RMSNorm's square root")
    rope_theta: PositiveFloat = doc("base of the rotary frequencies")
    rope: RopeScaling = doc("scaling of the rotary frequencies")
    tie_embeddings: bool = doc("the head is the embedding")
    qk_norm: bool = default("RMSNorm on each query and key head before RoPE", False)
    vocab_multiple: PositiveInt = default(
        "embedding and head have vocab_size rounded up to a multiple of it as rows, which then"
        " divide over devices; the rows beyond are zeros and no part of the function",
        1,
    )
    init: Init = default(
        "initialisation",
        TruncatedNormalInit(kind="truncated_normal", std=0.02, scale_residual=True),
    )

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        _check_rope(self.rope, self.max_length, self.head_dim, self.rope_theta)

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head: `vocab_size` and the padding after it."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def unpadded(self) -> "ModelConfig":
        """The same function without padding, as other formats have it."""
        return dataclasses.replace(self, vocab_multiple=1)
