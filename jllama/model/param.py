"""How a parameter is declared: value, logical axes and weight decay in one place."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jllama.config import FanInInit, Init, TruncatedNormalInit

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
# What is kept of a parameter that was read, given its dotted path: so the whole model need not lie
# in memory as it is stored.
EachLeaf = Callable[[str, Any], Any]


@flax.struct.dataclass
class Declared(nn.meta.AxisMetadata):
    """A parameter with what was said where it was declared; `nn.scan` adds the layer axis."""

    value: Any
    axes: tuple[str, ...] = flax.struct.field(pytree_node=False)
    decay: bool = flax.struct.field(pytree_node=False)
    inputs: int = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Declared":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Declared":
        axes = list(self.axes)
        axes.insert(index, params[nn.PARTITION_NAME])
        return self.replace(axes=tuple(axes))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Declared":
        axes = list(self.axes)
        axes.pop(index)
        return self.replace(axes=tuple(axes))


def declare(
    init: Initializer, axes: tuple[str, ...], *, decay: bool, inputs: int = 0
) -> Callable[..., Declared]:
    """An initialiser whose result carries what is said here.

    `axes` are its logical axes, `decay` whether weight decay applies, and `inputs` how many of the
    leading axes a matrix contracts; 0 for what is no matrix of a block.
    """

    def boxed(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Declared:
        return Declared(init(key, shape, dtype), axes, decay, inputs)

    return boxed


def matrix_init(init: Init, *, fan_in: int, depth: int | None = None) -> Initializer:
    """The initialiser of a matrix with `fan_in` inputs.

    `depth` is given by the two matrices of a block that write to the residual stream: their
    standard deviation is divided by sqrt(2 * depth) if the config says so (GPT-2, section 2.3).
    The normal is cut at two standard deviations, which leaves 0.88 of the stated one.
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


def kept(tree: Any, each: EachLeaf) -> Any:
    """The tree of what is kept of its leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, x: each(dotted(path), x), tree)
