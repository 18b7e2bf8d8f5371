"""Token-weighted cross-entropy that never holds all logits.

B batch, T predicted positions, D model width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jllama.parallel.sharding import constrain


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """[B, T, ...] -> [T/block, B, block, ...]: cut along T, so that rows stay on their device.

    T is filled up with zeros to a multiple of `block`: positions of weight 0.
    """
    B, T = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -T % block), *((0, 0) for _ in x.shape[2:])))
    return jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0)


def _block_logits(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    out = jnp.einsum("BTD,VD->BTV", hidden, weight, preferred_element_type=jnp.float32)
    return constrain(out, "batch", "seq", "act_vocab")


def _log_z(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    top = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    exp = jnp.exp(logits - top)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    return jnp.log(total) + top, exp, total


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Sums of weights * (-log p(target) + z_loss * log(Z)^2), and the same without the z term.

    Logits exist for `block` positions of each row at a time. The gradients are made in the same
    pass over the blocks: three matrix products in all, nothing recomputed. Only the first result
    has a gradient; z_loss is from PaLM (arXiv:2204.02311, section 5).

    Args:
      hidden: [B,T,D], whose dtype is that of the products; `weight` [V,D].
      targets: [B,T] int32; `weights` [B,T] float32.

    Returns:
      Two float32 scalars: loss with the z term, loss without it.
    """
    return _forward(hidden, weight, targets, weights, z_loss, block, gradients=False)[0]


def _forward(hidden, weight, targets, weights, z_loss, block, gradients):
    B, T, D = hidden.shape
    block = min(block, T)
    head = weight.astype(hidden.dtype)
    vocab = lax.broadcasted_iota(jnp.int32, (1, 1, weight.shape[0]), 2)

    def one(carry, xs):
        h, y, w = xs
        logits = _block_logits(h, head)
        log_z, exp, total = _log_z(logits)
        hit = vocab == y[..., None]
        chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        nll = jnp.sum(w * (log_z[..., 0] - chosen))
        full = nll + z_loss * jnp.sum(w * jnp.square(log_z[..., 0]))
        sums = (carry[0] + full, carry[1] + nll)
        if not gradients:
            return sums, None
        scale = w[..., None] * (1.0 + 2.0 * z_loss * log_z) / total
        d_logits = (exp * scale - jnp.where(hit, w[..., None], 0.0)).astype(h.dtype)
        d_h = jnp.einsum("BTV,VD->BTD", d_logits, head)
        d_weight = jnp.einsum("BTD,BTV->DV", h, d_logits, preferred_element_type=jnp.float32)
        return (*sums, carry[2] + d_weight), d_h

    zero = jnp.zeros((), jnp.float32)
    carry = (zero, zero, jnp.zeros(weight.T.shape, jnp.float32)) if gradients else (zero, zero)
    xs = tuple(_blocks(x, block) for x in (hidden, targets, weights))
    carry, d_hidden = lax.scan(one, carry, xs)
    if not gradients:
        return carry, None
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(B, -1, D)[:, :T]
    return carry[:2], (d_hidden, carry[2].T)


def _cross_entropy_fwd(hidden, weight, targets, weights, z_loss, block):
    out, (d_hidden, d_weight) = _forward(
        hidden, weight, targets, weights, z_loss, block, gradients=True
    )
    return out, (d_hidden, d_weight.astype(weight.dtype))


def _cross_entropy_bwd(z_loss, block, residuals, cotangents):
    d_hidden, d_weight = residuals
    g = cotangents[0]
    return (d_hidden * g).astype(d_hidden.dtype), (d_weight * g).astype(d_weight.dtype), None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
