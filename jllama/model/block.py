"""One transformer block: pre-norm attention and SwiGLU feed-forward (arXiv:2302.13971)."""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from jllama.config import ComputeConfig, ModelConfig
from jllama.model.attention import Attention, Cache, Tables
from jllama.model.linear import Matrix, project
from jllama.model.norm import RMSNorm
from jllama.model.param import matrix_init
from jllama.parallel.context import platform
from jllama.parallel.sharding import constrain


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): `down(silu(gate(x)) * up(x))`."""

    config: ModelConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype, param_dtype = self.config, self.compute.dtype, self.compute.param_dtype
        D, F = c.hidden_dim, c.ffn_dim
        init = matrix_init(c.init, fan_in=D)
        gate = Matrix((D,), (F,), ("embed", "ffn"), init, param_dtype, name="gate")
        up = Matrix((D,), (F,), ("embed", "ffn"), init, param_dtype, name="up")
        init = matrix_init(c.init, fan_in=F, depth=c.num_layers)
        down = Matrix((F,), (D,), ("ffn", "embed"), init, param_dtype, name="down")

        gated, h = project(x, gate, up, dtype=dtype)
        # When only the shape matters, no device need be there to be asked for its platform.
        if not self.is_initializing():
            h = swiglu(gated, h)
        (y,) = project(h, down, dtype=dtype)
        return y


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up`."""
    return _stored_swiglu(gate, up) if platform() == "tpu" else _swiglu(gate, up)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def _stored_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """SwiGLU whose result, in training, and gradients are stored.

    XLA would compute them inside the products that use them, again for each block of a product,
    which takes a TPU longer than to read them.
    """
    return _swiglu(gate, up)


def _stored_swiglu_fwd(gate, up):
    return jax.lax.optimization_barrier(_swiglu(gate, up)), (gate, up)


def _stored_swiglu_bwd(saved, d):
    return jax.lax.optimization_barrier(jax.vjp(_swiglu, *saved)[1](d))


_stored_swiglu.defvjp(_stored_swiglu_fwd, _stored_swiglu_bwd)


def _residual(x: jax.Array, h: jax.Array) -> jax.Array:
    """x + h, constrained: else the gradient's sum would be computed where it is gathered next."""
    return constrain(x + h, "batch", "block_seq", "act_embed")


class Block(nn.Module):
    """One layer; the carry of the scan over layers is x [B,T,D] and the whole cache, or None."""

    config: ModelConfig
    compute: ComputeConfig
    balanced: bool = False

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Cache | None],
        layer: jax.Array,
        rope: tuple[Tables, Tables | None],
        positions: jax.Array,
        segments: jax.Array | None,
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        x, cache = carry
        x = checkpoint_name(x, "block_input")
        c, param_dtype = self.config, self.compute.param_dtype

        def norm(name):
            return RMSNorm(c.rms_norm_eps, "norm", param_dtype, name=name)

        with jax.named_scope("attention"):
            h = norm("attention_norm")(x)
            h, cache = Attention(c, self.compute, self.balanced, name="attention")(
                h, cache, layer, rope, positions, segments
            )
            x = _residual(x, h)
        with jax.named_scope("mlp"):
            x = _residual(x, MLP(c, self.compute, name="mlp")(norm("ffn_norm")(x)))
        return (x, cache), None
