"""What the devices can do at most, and where what was compiled for them is kept."""

import functools
import time

import jax
import jax.numpy as jnp

from jllama import storage
from jllama.chips import chip_of


@functools.cache
def peak_flops(dtype: str) -> tuple[float, str]:
    """FLOP/s of one device, and whether that is "published" or "measured".

    A published figure exists for bfloat16 on known chips. Otherwise it is the best of several
    square products in `dtype`, which takes a moment.
    """
    chip = chip_of(jax.devices()[0].device_kind)
    if dtype == "bfloat16" and chip:
        return chip.flops, "published"
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
