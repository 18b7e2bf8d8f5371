"""The causal-LM loss function: sums over a batch of packed rows.

B batch, T predicted positions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jllama.config import Config
from jllama.model import llama
from jllama.train.cross_entropy import cross_entropy

Batch = dict[str, jax.Array]


def row_positions(segments: jax.Array) -> jax.Array:
    """Position of each token within its own segment: segments [B,T] -> [B,T] int32."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return index - lax.cummax(jnp.where(starts, index, 0), axis=1)


def causal_lm_loss(
    config: Config, trainable: Any, frozen: Any, batch: Batch, key: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Next-token loss of a batch in the row format of `jllama.data.pack`.

    Returns:
      loss_sum, weight_sum and {"nll_sum"}: float32 scalars, sums over predicted tokens, in nats.
    """
    del frozen, key
    tokens, segments, weights = batch["tokens"], batch["segments"], batch["weights"]
    inputs = segments[:, :-1]
    hidden, _ = llama.apply(
        trainable, config.model, config.compute, tokens[:, :-1], row_positions(inputs), inputs
    )
    with jax.named_scope("loss"):
        head = llama.head_weight(trainable, config.model)
        loss, nll = cross_entropy(
            hidden, head, tokens[:, 1:], weights[:, 1:],
            config.training.z_loss, config.compute.loss_block,
        )  # fmt: skip
        return loss, jnp.sum(weights[:, 1:]), {"nll_sum": nll}
