"""The LLaMA decoder (arXiv:2302.13971, 2307.09288, 2407.21783) and its pure functions.

Parameters are nested dicts of arrays; the layers are stacked on a leading axis:

  embedding.weight [V,D]   layers.{attention_norm,ffn_norm}.scale [L,D]   final_norm.scale [D]
  layers.attention.{q [L,D,H,N], k [L,D,K,N], v [L,D,K,N], o [L,H,N,D]}.kernel
  layers.mlp.{gate [L,D,F], up [L,D,F], down [L,F,D]}.kernel
  head.weight [V,D] unless tied; layers.attention.{q_norm,k_norm}.scale [L,N] with qk_norm

V is `ModelConfig.vocab_rows` in the tables, whose rows from `vocab_size` on are zeros, and
`vocab_size` in logits.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jllama.config import ComputeConfig, ModelConfig
from jllama.model.attention import Cache
from jllama.model.block import Block
from jllama.model.norm import RMSNorm
from jllama.model.param import Declared, Initializer, declare, dotted, embedding_init
from jllama.model.rope import Turns, grows, rope_tables
from jllama.model.rope import turns as turns_of
from jllama.parallel.product import take_rows
from jllama.parallel.sharding import Placement, constrain

Params = dict[str, Any]

_policies = jax.checkpoint_policies


def _cudnn_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    # cuDNN's log-sum-exp has no name that a policy could save, so the policy matches its primitive.
    return primitive.name.startswith("dot_product_attention_fwd")


# The values of a block that `compute.remat` saves for the backward pass, besides the block's input;
# all others are computed again. "offload" saves the input, in host memory. The names are those of
# `checkpoint_name`: "matmul" in `project`, "attention" for its result and log-sum-exp.
_REMAT = {
    "dots": _policies.save_from_both_policies(
        _policies.save_only_these_names("matmul", "attention"), _cudnn_forward
    ),
    "attention": _policies.save_from_both_policies(
        _policies.save_only_these_names("attention"), _cudnn_forward
    ),
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


# Logical axes of the embedding and of the head.
TABLE_AXES = ("vocab", "table_embed")


class Embedding(nn.Module):
    """A table [V,D]: the token embedding, or the head."""

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        c = self.config
        init = embedding_init(c.init)
        if c.vocab_rows > c.vocab_size:
            init = _zeros_beyond(c.vocab_size, init)
        return self.param(
            "weight",
            declare(init, TABLE_AXES, decay=True),
            (c.vocab_rows, c.hidden_dim),
            self.compute.param_dtype,
        )


def _zeros_beyond(rows: int, init: Initializer) -> Initializer:
    def padded(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        real = lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0) < rows
        return jnp.where(real, init(key, shape, dtype), 0)

    return padded


class Transformer(nn.Module):
    """Maps tokens to the hidden state after the final norm; `logits` maps that to logits."""

    config: ModelConfig
    compute: ComputeConfig
    balanced: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
        turns: Turns | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        table = Embedding(c, self.compute, name="embedding")()
        if not c.tie_embeddings:
            Embedding(c, self.compute, name="head")()  # declared for `logits` and the loss
        with jax.named_scope("embedding"):
            x = take_rows(table, tokens, TABLE_AXES, self.compute.dtype)
            x = constrain(x, "batch", "block_seq", "act_embed")
        if turns is None:
            turns = turns_of(c, tokens.shape[1] if cache is None else None)
        rope, key_rope = rope_tables(turns, positions), None
        if cache is not None and grows(c):  # RoPE is applied to keys as they are read
            key_rope = rope_tables(turns, jnp.arange(cache.k.shape[3])[None])

        block = Block
        if self.compute.remat != "none" and cache is None:
            block = nn.remat(
                block, policy=_REMAT[self.compute.remat], prevent_cse=self.compute.scan_unroll > 1
            )
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            unroll=min(self.compute.scan_unroll, c.num_layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        # As a carry the cache is written in place; as scanned data it would be copied.
        (x, cache), _ = layers(c, self.compute, self.balanced, name="layers")(
            (x, cache), jnp.arange(c.num_layers), (rope, key_rope), positions, segments
        )
        x = RMSNorm(c.rms_norm_eps, "norm", self.compute.param_dtype, name="final_norm")(x)
        return x, cache


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """The declaration of a parameter; see `jllama.model.param.declare`."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str, ...]
    decay: bool
    inputs: int


def _init_boxed(config: ModelConfig, compute: ComputeConfig, key: jax.Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config, compute).init(key, tokens, tokens)["params"]


def init_params(config: ModelConfig, compute: ComputeConfig, key: jax.Array) -> Params:
    """Initial parameters in `compute.param_dtype`; under jit the same for any sharding."""
    return nn.meta.unbox(_init_boxed(config, compute, key))


def param_specs(config: ModelConfig, compute: ComputeConfig) -> dict[str, Any]:
    """The parameter tree with a `ParamSpec` at each leaf; computes nothing."""
    return jax.tree.map(lambda spec: spec, _param_specs(config, compute.param_dtype))


@functools.cache  # tracing the model takes longer than all that asks for its specs
def _param_specs(config: ModelConfig, param_dtype: str) -> dict[str, Any]:
    compute = ComputeConfig(dtype="float32", param_dtype=param_dtype)
    boxed = jax.eval_shape(lambda: _init_boxed(config, compute, jax.random.key(0)))
    return jax.tree.map(
        lambda p: ParamSpec(p.value.shape, p.value.dtype, p.names, p.decay, p.inputs),
        boxed,
        is_leaf=lambda p: isinstance(p, Declared),
    )


def placed_shapes(
    config: ModelConfig, placement: Placement, dtype: str, scale_dtype: str
) -> Params:
    """The parameter tree with a `jax.ShapeDtypeStruct` and its sharding at each leaf.

    Matrices and tables have `dtype`, the scales of norms `scale_dtype`. Raises `UserError` if a
    parameter cannot be sharded by the rules.
    """
    return place(param_specs(config, ComputeConfig(dtype="float32")), placement, dtype, scale_dtype)


def place(specs: Any, placement: Placement, dtype: str, scale_dtype: str) -> Any:
    """`placed_shapes` for a tree of `ParamSpec`."""

    def placed(path: tuple[Any, ...], spec: ParamSpec) -> jax.ShapeDtypeStruct:
        sharding = placement.sharding(spec.shape, spec.axes, dotted(path))
        leaf_dtype = scale_dtype if path[-1].key == "scale" else dtype
        return jax.ShapeDtypeStruct(spec.shape, leaf_dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, specs)


def apply(
    params: Params,
    config: ModelConfig,
    compute: ComputeConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array | None = None,
    cache: Cache | None = None,
    balanced: bool = False,
    turns: Turns | None = None,
    lora: Params | None = None,
) -> tuple[jax.Array, Cache | None]:
    """The hidden state after the final norm.

    Args:
      tokens, positions: [B,T] int32; RoPE depends on the positions, and with a cache they are the
        slots that are written.
      segments: [B,T] int32 or None; without a cache, a position attends within its own segment.
      cache: None for whole rows, else the cache to read and to write.
      balanced: tokens, positions and segments, and so the result, are in the balanced layout of
        `jllama.parallel.context`.
      turns: RoPE's turns, from `jllama.model.rope.turns`; None takes them from the config, and T
        for the length of the text if the turns depend on it. With a cache the text is longer than
        T, so None is then a ValueError.
      lora: the overlays of the blocks' matrices, made by `jllama.adapt.lora`.

    Returns:
      hidden [B,T,D] in the compute dtype, and the updated cache.
    """
    model = Transformer(config, compute, balanced)
    variables = {"params": params} | ({"lora": lora} if lora else {})
    return model.apply(variables, tokens, positions, segments, cache, turns)


def head_weight(params: Params, config: ModelConfig) -> jax.Array:
    """The output matrix [V,D], with its padding."""
    return params["embedding" if config.tie_embeddings else "head"]["weight"]


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """hidden [B,T,D] -> float32 logits [B,T,V]."""
    weight = head_weight(params, config).astype(hidden.dtype)
    out = jnp.einsum("BTD,VD->BTV", hidden, weight, preferred_element_type=jnp.float32)
    out = constrain(out, "batch", "seq", "act_vocab")
    return out[..., : config.vocab_size]
