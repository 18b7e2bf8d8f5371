"""The causal-LM loss function: sums over a batch of packed rows.

B batch, T predicted positions, D model width, V vocabulary.
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
    """Returns each token's position within its segment: segments [B,T] -> [B,T] int32."""
    return jnp.arange(segments.shape[1], dtype=jnp.int32) - segment_starts(segments)


def causal_lm_loss(
    config: Config, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The next-token loss of a batch whose rows are those of `jllama.data.pack`.

    The logits of `compute.loss_block` tokens of a device exist at a time.

    Args:
      trainable, frozen: the parameters and (), or an overlay and its base; see
        `jllama.train.state`.
      batch: "tokens" and "segments" int32, "weights" float32; each [B,T+1].
      key: for dropout of an overlay; None in evaluation, where nothing is dropped.

    Returns:
      loss_sum, weight_sum and {"nll_sum": ...}: float32 scalars, sums over predicted tokens, in
      nats. The loss is the negative log-likelihood plus the z term of `training.z_loss`.
    """
    params, hidden, targets, weights = _hidden(config, trainable, frozen, batch, key)
    with jax.named_scope("loss"):
        head = llama.head_weight(params, config.model)
        loss, nll = cross_entropy(
            hidden, head, targets, weights,
            config.training.z_loss, config.compute.loss_block, config.model.vocab_size,
        )  # fmt: skip
        return loss, jnp.sum(weights), {"nll_sum": nll}


def causal_lm_logits(
    config: Config, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits, targets and weights, from which a loss function of one's own is written.

    The arguments are those of `causal_lm_loss`. All logits of a microbatch exist at once, which
    takes 4 B T V bytes over the devices.

    Returns:
      logits [B,T,V] float32, targets [B,T] int32, and the targets' weights [B,T] float32, 0 where
      nothing is predicted. When rows are spread over the mesh axis `context`, the T positions are
      in another order than the text, the same one in all three.
    """
    params, hidden, targets, weights = _hidden(config, trainable, frozen, batch, key)
    return llama.logits(params, config.model, hidden), targets, weights


def _hidden(
    config: Config, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
) -> tuple[llama.Params, jax.Array, jax.Array, jax.Array]:
    """Returns the parameters, hidden states [B,T,D], targets [B,T] and their weights [B,T]."""
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
    # When rows are spread over devices, positions are reordered so that each device has the same
    # work in attention. Only attention relates positions, so one reordering, here, is enough.
    order = balanced_order(targets.shape[1], sequence_ways(*targets.shape))
    if order is not None:
        inputs, targets, weights = jax.tree.map(
            lambda x: jnp.take(x, order, axis=1), (inputs, targets, weights)
        )
    hidden, _ = llama.apply(
        params, config.model, config.compute, *inputs, balanced=order is not None, lora=overlay
    )
    return params, hidden, targets, weights
