"""Accelerators: their published and measured peaks, and the cache of compiled programs."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from jllama.files import storage

GIB = 2**30
TPU_LANES = 128  # of a vector register: the least width of a block in a kernel


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one chip, which is one device in JAX; None where nothing is published.

    Attributes:
      kind: the beginning of JAX's device_kind.
      flops: dense bfloat16 FLOP/s.
      hbm_bytes: memory that a program may use. For TPUs it is the compiler's own figure, "exceeds
        available HBM (15.75G)", to the two decimals it prints (libtpu 0.0.42); it is a quarter of a
        GiB or more below the data sheet's.
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s that a chip sends over all its links to neighbours at once, half of the
        "bidirectional" figure. Between NVIDIA GPUs of one host it is NVLink.
      dcn_bandwidth: bytes/s of the host's network per chip.
      torus: dimensions of a TPU slice; a chip has two links along each.
      flops_per_cycle: bfloat16 FLOPs of a TPU's matrix units in a cycle, 2 x units x side^2. The
        compiler's estimate for a product of 16,384^2 agrees within a quarter (libtpu 0.0.42).
    """

    kind: str
    flops: float
    hbm_bytes: float | None = None
    hbm_bandwidth: float | None = None
    ici_bandwidth: float | None = None
    dcn_bandwidth: float | None = None
    torus: int | None = None
    flops_per_cycle: int | None = None


_UNIT = 2 * 128**2  # FLOPs of a matrix unit in a cycle; those of v6e have twice the side
# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, read in 2026. Links of v4: table 4 of
# arXiv:2304.01433, 6 links of 50 GB/s. Networks: v5p "50 Gbps per chip"; v5e and v6e "6.4 Tbps" and
# "25.6 Tbps per pod" of 256 chips; none is published for v4.
# GPUs: the NVIDIA A100 80GB, H100 and H200 SXM data sheets; NVLink 600 and 900 GB/s are both
# directions together.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 30.75 * GIB, 1200e9, 300e9, None, 3, 8 * _UNIT),
    "v5e": Chip("TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 200e9, 25e9 / 8, 2, 4 * _UNIT),
    "v5p": Chip("TPU v5", 459e12, 95.74 * GIB, 2765e9, 600e9, 50e9 / 8, 3, 8 * _UNIT),
    "v6e": Chip("TPU v6 lite", 918e12, 31.25 * GIB, 1638e9, 400e9, 100e9 / 8, 2, 16 * _UNIT),
    "a100": Chip("NVIDIA A100", 312e12, None, 2039e9, 300e9, None),
    "h100": Chip("NVIDIA H100", 989e12, None, 3350e9, 450e9, None),
    "h200": Chip("NVIDIA H200", 989e12, None, 4800e9, 450e9, None),
}
_OTHER_NAMES = {"TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e"}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, if it is known here."""
    names = {chip.kind: name for name, chip in CHIPS.items()} | _OTHER_NAMES
    # The longest match: "TPU v5 lite" is not a "TPU v5".
    kind = max((k for k in names if device_kind.startswith(k)), key=len, default=None)
    return CHIPS[names[kind]] if kind else None


@functools.cache
def peak_flops(dtype: str) -> tuple[float, str]:
    """FLOP/s of one device, and whether the figure is "published" or "measured".

    For bfloat16 on a known chip it is published. Otherwise it is measured, with square matrix
    products in `dtype`, which takes a moment.
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
    """Keeps compiled programs in `folder`, unless it is empty or a cache is already set up."""
    if folder and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(storage.path(folder)))
