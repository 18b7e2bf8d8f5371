"""Token-weighted cross-entropy that never holds all logits in memory.

B batch, T predicted positions, D model width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jllama.model.blockwise import cut
from jllama.model.llama import TABLE_AXES
from jllama.parallel.context import platform
from jllama.parallel.product import all_gather, reduce
from jllama.parallel.sharding import active_placement

_NEVER = -1e30  # a finite logit whose probability is 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float,
    block: int | None,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
    """The sum of weights * (-log p(target) + z_loss * log(Z)^2), and the sum without the z term.

    A device holds the logits of `block` tokens at a time; None is 512 on CPUs and 1024 elsewhere.
    The same pass over the blocks computes the gradients: three matrix products in all, or two if
    `weight` needs no gradient, and nothing is recomputed. Only the first result is differentiable.
    z_loss is from PaLM (arXiv:2204.02311, section 5).

    Args:
      hidden: [B,T,D]; its dtype is the dtype of the products.
      weight: [V,D]. Its rows from `vocab_size` on are padding: they are no tokens, and their
        gradient is exactly 0.
      targets: [B,T] int32; `weights` [B,T] float32.

    Returns:
      Two float32 scalars: the loss with the z term and without it.
    """
    return _forward(hidden, weight, targets, weights, z_loss, block, vocab_size, gradients=False)[0]


def default_block() -> int:
    """The tokens whose logits a device holds at a time where nobody says how many."""
    return 512 if platform() == "cpu" else 1024


def _forward(
    hidden, weight, targets, weights, z_loss, block, vocab_size, gradients, of_weight=False
):
    """The two sums, and the gradients of hidden and of weight, or None without `gradients`.

    The gradient of weight is float32, or None without `of_weight`.
    """
    placement = active_placement()
    block = block or default_block()
    one_device = functools.partial(
        _one_device,
        z_loss=z_loss,
        block=block,
        vocab_size=vocab_size if vocab_size < weight.shape[0] else None,
        gradients=gradients,
        of_weight=of_weight,
    )
    if placement is None or placement.mesh.size == 1:
        sums, gradients = one_device(hidden, weight.astype(hidden.dtype), targets, weights)
        return sums, gradients and (gradients[0], gradients[1].T if of_weight else None)
    return _many_devices(one_device, placement, hidden, weight, targets, weights)


def _one_device(
    hidden, head, targets, weights, z_loss, block, vocab_size, gradients, of_weight, vocab_axes=()
):
    """The work of one device: all positions of `hidden`, with the local shard `head` [V,D].

    The vocabulary is sharded over the mesh axes `vocab_axes`. The sums are over all shards; the
    gradient of hidden comes from this shard alone. `vocab_size` is None if no row is padding.
    The gradient of the head is [D,V] float32.
    """
    B, T, D = hidden.shape
    block = min(max(1, block // B), T)  # positions of each row
    vocab = lax.broadcasted_iota(jnp.int32, (1, 1, head.shape[0]), 2)
    if vocab_axes:
        vocab += lax.axis_index(vocab_axes) * head.shape[0]

    def block_of_tokens(carry, xs):
        h, y, w = xs
        logits = jnp.einsum("BTD,VD->BTV", h, head, preferred_element_type=jnp.float32)
        if vocab_size is not None:
            logits = jnp.where(vocab < vocab_size, logits, _NEVER)
        top = jnp.max(logits, axis=-1, keepdims=True)
        top = lax.pmax(top, vocab_axes) if vocab_axes else top
        exp = jnp.exp(logits - top)
        hit = vocab == y[..., None]
        total = jnp.sum(exp, axis=-1, keepdims=True)
        chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        if vocab_axes:
            total, chosen = lax.psum((total, chosen), vocab_axes)
        log_z = jnp.log(total) + top
        nll = jnp.sum(w * (log_z[..., 0] - chosen))
        full = nll + z_loss * jnp.sum(w * jnp.square(log_z[..., 0]))
        sums = (carry[0] + full, carry[1] + nll)
        if not gradients:
            return sums, None
        scale = w[..., None] * (1.0 + 2.0 * z_loss * log_z) / total
        d_logits = (exp * scale - jnp.where(hit, w[..., None], 0.0)).astype(h.dtype)
        d_h = jnp.einsum("BTV,VD->BTD", d_logits, head)
        if not of_weight:
            return (*sums, None), d_h
        if platform() == "cpu":
            # XLA's CPU backend has no transposed bfloat16 product with a float32 result.
            h, d_logits = h.astype(jnp.float32), d_logits.astype(jnp.float32)
        d_weight = jnp.einsum("BTD,BTV->DV", h, d_logits, preferred_element_type=jnp.float32)
        return (*sums, carry[2] + d_weight), d_h

    zero = jnp.zeros((), jnp.float32)
    d_weight = jnp.zeros(head.T.shape, jnp.float32) if of_weight else None
    carry = (zero, zero, d_weight) if gradients else (zero, zero)
    # Cut along T, so that rows stay on their device; the padding has weight 0.
    xs = tuple(cut(x, 1, block) for x in (hidden, targets, weights))
    carry, d_hidden = lax.scan(block_of_tokens, carry, xs)
    if not gradients:
        return carry, None
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(B, -1, D)[:, :T]
    return carry[:2], (d_hidden, carry[2])


def _many_devices(one_device, placement, hidden, weight, targets, weights):
    """Runs `one_device` on every device, with collectives that XLA would repeat for each block.

    A call all-gathers the head's width in hidden's dtype, and reduce-scatters its float32 gradient.
    Where the vocabulary divides over devices that hold the same rows (tensor parallelism), it is
    sharded over them: hidden's positions are gathered, hidden's gradient is reduce-scattered, and
    each block reduces three numbers a position (arXiv:1909.08053, section 3). Where it does not
    divide, every device has the whole vocabulary for its own positions.
    """
    rows, positions, _ = placement.mesh_axes(hidden.shape, ("batch", "block_seq", None), "loss")
    vocab, width = placement.mesh_axes(weight.shape, TABLE_AXES, "loss")
    vocab = tuple(a for a in vocab if a not in rows)
    sharded = tuple(a for a in positions if a not in vocab)
    gathered = tuple(a for a in positions if a in vocab)
    if sharded + gathered != positions:  # gathering the outer axis would shuffle the positions
        positions, gathered = sharded, ()
    others = tuple(a for a in placement.axes if a not in vocab)
    # Devices along these axes hold the same rows, positions and tokens: only the first one counts.
    idle = tuple(a for a in others if a not in rows + sharded)

    def device(hidden, weight, targets, weights):
        head = all_gather(weight.astype(hidden.dtype), width, 1)
        hidden = all_gather(hidden, gathered, 1)
        if idle:
            weights = jnp.where(lax.axis_index(idle) == 0, weights, 0.0)
        sums, gradients = one_device(hidden, head, targets, weights, vocab_axes=vocab)
        sums = lax.psum(sums, others)
        if gradients is None:
            return sums, None
        d_hidden, d_weight = gradients
        d_hidden = reduce(d_hidden, vocab + idle, ((), gathered, ()))
        if d_weight is not None:
            d_weight = reduce(d_weight, others, (width, ()), is_gradient=True).T
            # The backward pass of the layers waits for this: else the whole gradient, which
            # only the optimizer reads, would be kept in memory beside them.
            d_hidden, d_weight = lax.optimization_barrier((d_hidden, d_weight))
        return sums, (d_hidden, d_weight)

    spec, table = placement.partition(rows, positions, ()), placement.partition(vocab, width)
    row = placement.partition(rows, sharded)
    gradients = None
    if one_device.keywords["gradients"]:
        gradients = (spec, table if one_device.keywords["of_weight"] else None)
    return placement.per_device(
        device, (spec, table, row, row), (placement.partition(), gradients)
    )(hidden, weight, targets, weights)


def _cross_entropy_fwd(hidden, weight, targets, weights, z_loss, block, vocab_size):
    # A head that a LoRA overlay leaves frozen needs no gradient, which saves a third of the
    # products.
    of_weight = weight.perturbed
    arrays = (x.value for x in (hidden, weight, targets, weights))
    out, (d_hidden, d_weight) = _forward(*arrays, z_loss, block, vocab_size, True, of_weight)
    return out, (d_hidden, d_weight.astype(weight.value.dtype) if of_weight else None)


def _cross_entropy_bwd(z_loss, block, vocab_size, residuals, cotangents):
    g = cotangents[0]
    if isinstance(g, SymbolicZero):
        g = jnp.zeros(g.shape, g.dtype)
    d_hidden, d_weight = (None if d is None else (d * g).astype(d.dtype) for d in residuals)
    return d_hidden, d_weight, None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd, symbolic_zeros=True)
