"""What the devices can do at most, and where what was compiled for them is kept."""

import functools
import time

import jax
import jax.numpy as jnp

from jllama import storage

# Dense FLOP/s of one chip (one device in JAX), bfloat16, from the vendors' data sheets:
# cloud.google.com/tpu/docs/system-architecture-tpu-vm and the NVIDIA H100, H200, A100 data sheets.
_BFLOAT16_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


@functools.cache
def peak_flops(dtype: str) -> tuple[float, str]:
    """FLOP/s of one device, and whether that is "published" or "measured".

    A published figure exists for bfloat16 on known chips. Otherwise it is the best of several
    square products in `dtype`, which takes a moment.
    """
    kind = jax.devices()[0].device_kind
    # The longest match: "TPU v5 lite" is not a "TPU v5".
    known = max((k for k in _BFLOAT16_PEAK if kind.startswith(k)), key=len, default=None)
    if dtype == "bfloat16" and known:
        return _BFLOAT16_PEAK[known], "published"
    return measured_matmul_flops(dtype), "measured"


def measured_matmul_flops(dtype: str, size: int = 2048, repeats: int = 10) -> float:
    """FLOP/s of the best of `repeats` products of two [size, size] matrices on one device."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`; empty is off, and a cache already set up stays."""
    if folder and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(storage.path(folder)))
