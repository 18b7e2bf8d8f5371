"""Attention over whole rows: chooses the kernel of an `AttentionConfig`, and calls it.

B batch, T positions, H query heads, K key/value heads, G = H/K, N head width.
"""

import functools

import jax
import jax.numpy as jnp

from jllama.chips import TPU_LANES as LANES
from jllama.config import (
    AttentionConfig,
    AutoAttention,
    BlockwiseAttention,
    CudnnAttention,
    ReferenceAttention,
    SplashAttention,
)
from jllama.errors import UserError
from jllama.model.blockwise import MASKED, blockwise, segment_starts
from jllama.parallel import context


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention; q [B,T,H,N], k and v [B,S,K,N], mask [B,T,S] bool -> [B,T,H,N].

    It computes all scores at once. Scores and softmax are float32.
    """
    B, T, H, N = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, H // K, N)
    scores = jnp.einsum("BTKGN,BSKN->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * N**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKN->BTKGN", weights, v).reshape(B, T, H, N)


def attend_row(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    config: AttentionConfig,
    balanced: bool = False,
    prevent_cse: bool = True,
) -> jax.Array:
    """Causal attention within rows, and within the segments of each row.

    A segment is a run of equal numbers. The causal mask compares places in the row.

    Args:
      q: [B,T,H,N]; k, v: [B,T,K,N]; segments: [B,T] int32, or None for one segment a row.
      config: names the kernel, or is `auto`; see `choose_kernel`.
      balanced, prevent_cse: see `jllama.parallel.context.spread`.
    """
    ways = context.sequence_ways(*q.shape[:2])
    kind = choose_kernel(
        config, context.platform(), q.dtype, q.shape[1], q.shape[3], ways, segments is not None
    )
    mask = None
    match kind:
        case BlockwiseAttention(block=block):
            kernel = functools.partial(_blockwise, block=block)
        case CudnnAttention():
            kernel = _cudnn
        case SplashAttention(block=block):
            # Pallas's TPU kernels take a quarter of a second to import.
            from jllama.model.splash import causal_mask, splash  # noqa: PLC0415

            kernel, mask = splash, causal_mask(q.shape[1], ways, balanced, block)
        case ReferenceAttention():
            kernel = _reference

    def with_starts(q, k, v, rows, segments, mask):
        # A number may come back later in a row, so a segment is identified by where it starts.
        starts = None if segments is None else segment_starts(segments)
        return kernel(q, k, v, rows, starts, mask)

    return context.spread(with_starts, q, k, v, segments, balanced, mask, prevent_cse)


def choose_kernel(
    config: AttentionConfig,
    platform: str,
    dtype: jnp.dtype,
    length: int,
    head_dim: int,
    ways: int,
    segments: bool,
) -> AttentionConfig:
    """The kernel for rows of `length` positions over `ways` devices; never `auto`, never a block of
    None.

    `segments` says whether rows have segments. Raises `UserError` if the kernel of the config
    cannot compute such rows on this platform.
    """
    block = getattr(config, "block", None) or (64 if platform == "cpu" else 512)
    no_splash = _why_no_splash(platform, length, ways)
    no_cudnn = _why_no_cudnn(platform, dtype, head_dim, ways, segments)
    match config:
        case AutoAttention() if platform == "tpu" and no_splash is None:
            return SplashAttention(kind="splash", block=max(block, LANES))
        case AutoAttention() if platform == "gpu" and no_cudnn is None:
            return CudnnAttention(kind="cudnn")
        case AutoAttention() | BlockwiseAttention():
            return BlockwiseAttention(kind="blockwise", block=block)
        case SplashAttention() if no_splash is not None:
            raise UserError(f"compute.attention.kind=splash: {no_splash}")
        case CudnnAttention() if no_cudnn is not None:
            raise UserError(f"compute.attention.kind=cudnn: {no_cudnn}")
    return config


def _why_no_splash(platform: str, length: int, ways: int) -> str | None:
    if platform != "tpu":
        return f"is for TPU and this is {platform}; set compute.attention.kind=auto"
    if length % (LANES * ways):
        return (
            f"rows of {length} positions over {ways} device(s) do not give each a multiple of"
            f" {LANES}; change data.length, or set compute.attention.kind=blockwise"
        )
    return None


def _why_no_cudnn(
    platform: str, dtype: jnp.dtype, head_dim: int, ways: int, segments: bool
) -> str | None:
    if platform != "gpu":
        return f"is for NVIDIA GPUs and this is {platform}; set compute.attention.kind=auto"
    if segments:
        return (
            "does not support segments; set data.document_mask=false, or"
            " compute.attention.kind=blockwise"
        )
    if ways > 1:
        return "needs whole rows; set mesh.context=1, or compute.attention.kind=blockwise"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"does not take {dtype}; set compute.dtype=bfloat16"
    if head_dim % 8 or head_dim > 128:  # 256 from Hopper on, which the platform does not say
        return f"does not take heads of width {head_dim}; set compute.attention.kind=blockwise"
    return None


def _reference(q, k, v, rows, segments, mask):
    S = k.shape[1]
    seen = jnp.broadcast_to(rows[:, None] >= jnp.arange(S), (len(q), len(rows), S))
    if segments is not None:
        seen &= jnp.take(segments, rows, axis=1)[:, :, None] == segments[:, None, :]
    return attend(q, k, v, seen)


def _blockwise(q, k, v, rows, segments, mask, *, block):
    if segments is None:
        first = jnp.zeros(q.shape[:2], jnp.int32)
    else:
        first = jnp.take(segments, rows, axis=1)  # `with_starts` made them starts
    return blockwise(q, k, v, rows, first, block)


def _cudnn(q, k, v, rows, segments, mask):
    # `choose_kernel` allows whole rows of one segment only.
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
