"""The options with which XLA compiles a run's programs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jllama.chips import CHIPS, chip_of
from jllama.config import ComputeConfig, Config
from jllama.errors import UserError
from jllama.parallel.sharding import Placement

# On-chip memory that one fusion may use: with more, products read their factors less often. On v4
# and v6e it changes nothing.
_FUSION_MEMORY = {"xla_tpu_scoped_vmem_limit_kib": 32768}
# The SparseCore's collectives run beside the TensorCore's products: reduce-scatters, and gathers
# along one, two and three dimensions of the torus, which would else be fused with products.
_SPARSE_CORE_SCATTERS = "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter"
_SPARSE_CORE = {
    _SPARSE_CORE_SCATTERS: True,
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
}
# On v5e all-reduces are fused with products, but none of several arrays: large ones must not be
# combined. A reduce-scatter over a square of chips is one.
_ALL_REDUCES = {
    "xla_enable_async_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    "xla_jf_crs_combiner_threshold_in_bytes": 2**20,
}
# On v4 gathers are else fused with products of both cores, which wait for them.
_GATHERS = {"xla_enable_async_all_gather": True, "xla_tpu_megacore_fusion_allow_ags": False}
_OPTIONS: dict[str, dict[str, Any]] = {
    "v4": _GATHERS,
    "v5e": _FUSION_MEMORY | _ALL_REDUCES,
    "v5p": _FUSION_MEMORY | _SPARSE_CORE,
    "v6e": _SPARSE_CORE,
}


def default_options(placement: Placement) -> dict[str, Any]:
    """The options where the recipe gives none: those that the compiler's count of steps favours.

    docs/sharding.md has the counts.
    """
    chip = chip_of(placement.device_kind)
    options = next((o for name, o in _OPTIONS.items() if CHIPS[name] is chip), None)
    if options is None:
        return {}
    if not {"tensor", "context"} & set(placement.axes):
        # Propagation keeps a second copy of all parameters, in bfloat16, through the step. Where
        # activations are gathered it is needed: without it they are gathered in float32.
        options = options | {"xla_jf_bf16_propagation": False}
    return options


def xla_options(compute: ComputeConfig, placement: Placement) -> dict[str, Any]:
    """The options for the mesh's platform: `default_options`, and over them `compute.xla`.

    Defaults that this version of the compiler refuses are left out. Raises `UserError` for an
    option of the recipe that it does not know, or whose value it refuses.
    """
    given = dict(getattr(compute.xla, placement.platform, ()))
    options = default_options(placement) | given
    options = {name: value for name, value in options.items() if value is not None}
    # The compiler names one option at a time.
    while message := _refusal(tuple(options.items()), placement):
        refused = next(name for name in options if name in message)
        if refused in given:
            raise UserError(f"compute.xla.{placement.platform}: {message}")
        del options[refused]
    return options


def scatters_in_stages(options: dict[str, Any]) -> bool:
    """Whether a TPU's compiler with these options runs reduce-scatters beside products."""
    return bool(options.get(_SPARSE_CORE_SCATTERS))


@functools.cache
def _refusal(options: tuple[tuple[str, Any], ...], placement: Placement) -> str:
    """Why the compiler refuses the options, by an empty program; empty if it takes them."""
    if not options:
        return ""
    where = placement.replicated()
    program = jax.jit(lambda: jnp.zeros(()), out_shardings=where, compiler_options=dict(options))
    try:
        program.lower().compile()
    except (jax.errors.JaxRuntimeError, TypeError, ValueError) as error:
        message = " ".join(str(error).removeprefix("INVALID_ARGUMENT: ").split())[:300]
        if any(name in message for name, _ in options):
            return message
        raise
    return ""


def with_options(config: Config, placement: Placement) -> Config:
    """The recipe with the options that its programs are compiled with; raises as `xla_options`.

    A default that the recipe takes away stays null.
    """
    platform = placement.platform
    given = dict(getattr(config.compute.xla, platform, ()))
    options = xla_options(config.compute, placement)
    options |= {name: None for name, value in given.items() if value is None}
    if not options:
        return config
    xla = dataclasses.replace(config.compute.xla, **{platform: options})
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, xla=xla))


def as_text(options: dict[str, Any]) -> str:
    """The options as an environment variable would give them: "a=1 b=false"."""
    return " ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in options.items()
    )
