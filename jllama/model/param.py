"""Declares a parameter: its initialiser, logical axes and weight decay in one place."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jllama.config import FanInInit, Init, TruncatedNormalInit

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
# (dotted path, leaf) -> the leaf to use instead. A reader calls it for each parameter before it
# reads the next, so that the model is never all in memory as it is stored.
EachLeaf = Callable[[str, Any], Any]


class Declared(nn.Partitioned):
    """A parameter with its declaration; `nn.scan` adds the layers to `names`, its logical axes."""

    decay: bool = flax.struct.field(pytree_node=False, kw_only=True)
    inputs: int = flax.struct.field(pytree_node=False, kw_only=True)

    def unbox(self, apply_constraint: bool = True) -> Any:
        return self.value


def declare(
    init: Initializer, axes: tuple[str, ...], *, decay: bool, inputs: int = 0
) -> Callable[..., Declared]:
    """An initialiser that returns the parameter with its declaration.

    Args:
      axes: the logical axes.
      decay: whether weight decay applies.
      inputs: how many leading axes a matrix of a block contracts; 0 for other parameters.
    """

    def boxed(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Declared:
        return Declared(init(key, shape, dtype), axes, decay=decay, inputs=inputs)

    return boxed


def matrix_init(init: Init, *, fan_in: int, depth: int | None = None) -> Initializer:
    """The initialiser of a matrix with `fan_in` inputs.

    The two matrices of a block that write to the residual stream pass `depth`, the number of
    layers: their standard deviation is divided by sqrt(2 * depth) if the config says so (GPT-2,
    section 2.3). The normal distribution is truncated at two standard deviations, so the actual
    standard deviation is 0.88 of the stated one.
    """
    match init:
        case TruncatedNormalInit():
            std = init.std
        case FanInInit():
            std = fan_in**-0.5
    if depth is not None and init.scale_residual:
        std /= (2 * depth) ** 0.5
    return _truncated_normal(std)


def embedding_init(init: Init) -> Initializer:
    """The initialiser of the embedding and of the head."""
    return _truncated_normal(
        init.std if isinstance(init, TruncatedNormalInit) else init.embedding_std
    )


def _truncated_normal(std: float) -> Initializer:
    def sample(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        x = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
        return (std * x).astype(dtype)

    return sample


def dotted(path: tuple[Any, ...]) -> str:
    """A pytree path as `a.b.c`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def map_leaves(tree: Any, each: EachLeaf) -> Any:
    """The tree with `each(dotted path, leaf)` in the place of each leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, x: each(dotted(path), x), tree)
