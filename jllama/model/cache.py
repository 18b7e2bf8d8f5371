"""The key/value cache: data that goes into the model and comes out of it."""

import flax.struct
import jax
import jax.numpy as jnp

from jllama.config import ComputeConfig, ModelConfig


@flax.struct.dataclass
class Cache:
    """Keys and values, each [L, B, K, S, N]; slot s holds position s.

    Keys are turned by RoPE already, unless it `grows`. The slots of a head lie side by side, as
    attention reads them.

    Slots that were never written, or written by padding, lie beyond every query's position until
    they are overwritten, so causality alone hides them.
    """

    k: jax.Array
    v: jax.Array


def init_cache(config: ModelConfig, compute: ComputeConfig, batch: int, length: int) -> Cache:
    """An empty cache of `length` slots for `batch` rows, in the compute dtype."""
    shape = (config.num_layers, batch, config.num_kv_heads, length, config.head_dim)
    return Cache(jnp.zeros(shape, compute.dtype), jnp.zeros(shape, compute.dtype))
