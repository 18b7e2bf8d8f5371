"""The options with which XLA compiles a run's programs."""

from typing import Any

import jax
import jax.numpy as jnp

from jllama.config import ComputeConfig
from jllama.errors import UserError
from jllama.parallel.sharding import Placement

# docs/performance.md says what each does to the step, by the compiler's own count.
DEFAULTS: dict[str, dict[str, Any]] = {
    "tpu": {
        # On-chip memory that one fusion may use: with more, products read their factors less often.
        "xla_tpu_scoped_vmem_limit_kib": 32768,
        # Propagation keeps a second copy of all parameters, in bfloat16, through the step.
        "xla_jf_bf16_propagation": False,
    },
}


def xla_options(compute: ComputeConfig, placement: Placement) -> dict[str, Any]:
    """The options for the mesh's platform: `DEFAULTS`, and over them `compute.xla`.

    Raises `UserError` for an option that the compiler does not know, or whose value it refuses.
    """
    platform = placement.platform
    given = dict(getattr(compute.xla, platform, ()))
    options = DEFAULTS.get(platform, {}) | given
    options = {name: value for name, value in options.items() if value is not None}
    if given:
        where = placement.replicated()
        program = jax.jit(lambda: jnp.zeros(()), out_shardings=where, compiler_options=options)
        try:
            program.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            message = " ".join(str(error).removeprefix("INVALID_ARGUMENT: ").split())
            raise UserError(f"compute.xla.{platform}: {message[:300]}") from None
    return options
