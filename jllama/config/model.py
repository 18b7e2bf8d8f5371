"""Config of the architecture."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from jllama.config.base import PositiveFloat, PositiveInt, configclass, default, doc
from jllama.config.rope import RopeScaling, check_rope


@configclass
class TruncatedNormalInit:
    """Draws matrices from a normal distribution that is cut at two standard deviations.

    GPT-2's scaling of the outputs to the residual stream is optional.
    """

    kind: Literal["truncated_normal"] = doc("normal distribution cut at two standard deviations")
    std: PositiveFloat = doc("standard deviation of every matrix")
    scale_residual: bool = doc("divide the attention and MLP outputs' std by sqrt(2 num_layers)")


@configclass
class FanInInit:
    """Draws matrices with the std 1/sqrt(inputs), and embedding and head with `embedding_std`."""

    kind: Literal["fan_in"] = doc("truncated normal distribution of std 1/sqrt(inputs)")
    embedding_std: PositiveFloat = doc("standard deviation of embedding and head")
    scale_residual: bool = doc("divide the attention and MLP outputs' std by sqrt(2 num_layers)")


Init = Annotated[TruncatedNormalInit | FanInInit, Field(discriminator="kind")]


@configclass
class ModelConfig:
    """The architecture: all that decides the function from tokens and parameters to logits.

    It is hashable, so that it can be a static attribute of the modules.
    """

    vocab_size: PositiveInt = doc("number of token ids; rows of embedding and head")
    hidden_dim: PositiveInt = doc("width of the residual stream")
    num_layers: PositiveInt = doc("number of transformer blocks")
    num_heads: PositiveInt = doc("number of query heads")
    num_kv_heads: PositiveInt = doc("number of key/value heads; divides num_heads")
    head_dim: PositiveInt = doc("width of one head; an even number")
    ffn_dim: PositiveInt = doc("inner width of the SwiGLU feed-forward")
    max_length: PositiveInt = doc("number of positions that the model is trained for")
    rms_norm_eps: PositiveFloat = doc("epsilon inside RMSNorm's square root")
    rope_theta: PositiveFloat = doc("base of the rotary frequencies")
    rope: RopeScaling = doc("scaling of the rotary frequencies")
    tie_embeddings: bool = doc("the head uses the embedding as its matrix")
    qk_norm: bool = default("RMSNorm on each query and key head before RoPE", False)
    vocab_multiple: PositiveInt = default(
        "embedding and head have vocab_size rows, rounded up to a multiple of this so that devices"
        " can share them; the extra rows are zeros and never used",
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
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        check_rope(self.rope, self.max_length, self.head_dim, self.rope_theta)

    @property
    def vocab_rows(self) -> int:
        """Number of rows of embedding and head: `vocab_size` and the padding after it."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def unpadded(self) -> "ModelConfig":
        """The same architecture without padding, as other formats have it."""
        return dataclasses.replace(self, vocab_multiple=1)
