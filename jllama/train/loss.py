"""The causal-LM loss function: sums over a batch of packed rows.

B batch, T predicted positions.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jllama.adapt import lora
from jllama.config import Config, LoraConfig
from jllama.model import llama
from jllama.model.blockwise import segment_starts
from jllama.model.cross_entropy import cross_entropy
from jllama.parallel.context import balanced_order, sequence_ways

Batch = dict[str, jax.Array]


def row_positions(segments: jax.Array) -> jax.Array:
    """Position of each token within its own segment: segments [B,T] -> [B,T] int32."""
    return jnp.arange(segments.shape[1], dtype=jnp.int32) - segment_starts(segments)


def causal_lm_loss(
    config: Config, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Next-token loss of a batch in the row format of `jllama.data.pack`.

    Args:
      trainable, frozen: the parameters and (), or an overlay and its base; see
        `jllama.train.state`.
      key: None in evaluation, where nothing is dropped.

    Returns:
      loss_sum, weight_sum and {"nll_sum"}: float32 scalars, sums over predicted tokens, in nats.
    """
    params, overlay = trainable, None
    if isinstance(config.adapt, LoraConfig):
        params, overlay = lora.attach(config.adapt, frozen, trainable, key)
    segments = batch["segments"][:, :-1]
    if config.data.document_mask:
        positions = row_positions(segments)
    else:
        # Padding is at the end of a row, where causality alone hides it.
        positions = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
        segments = None
    inputs = (batch["tokens"][:, :-1], positions, segments)
    targets, weights = batch["tokens"][:, 1:], batch["weights"][:, 1:]
    # Nothing but attention looks from one position to another: when rows are spread over devices,
    # all that belongs to a position moves once, here, to where attention is the same work for all.
    order = balanced_order(targets.shape[1], sequence_ways(*targets.shape))
    if order is not None:
        inputs, targets, weights = jax.tree.map(
            lambda x: jnp.take(x, order, axis=1), (inputs, targets, weights)
        )
    hidden, _ = llama.apply(
        params, config.model, config.compute, *inputs, balanced=order is not None, lora=overlay
    )
    with jax.named_scope("loss"):
        head = llama.head_weight(params, config.model)
        loss, nll = cross_entropy(
            hidden, head, targets, weights,
            config.training.z_loss, config.compute.loss_block, config.model.vocab_size,
        )  # fmt: skip
        return loss, jnp.sum(weights), {"nll_sum": nll}
