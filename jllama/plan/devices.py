"""The devices of a topology as ahead-of-time compilers describe them; none needs to exist."""

import math
import os
from typing import Any

from jax.experimental import topologies

from jllama.errors import UserError
from jllama.plan.topology import Topology

_HOST = 8  # GPUs of a host
_MEMORY = 84_942_979_072  # bytes of memory of an H100 SXM, as its driver reports them

# Limits of compute capability 9.0 (CUDA programming guide, technical specifications) and of the
# H100 SXM: 132 multiprocessors, 50 MiB of L2, HBM3 at 2,619 MHz x 5,120 bits x 2.
_H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {_MEMORY}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compile_only_devices(topology: Topology) -> list[Any]:
    """The devices of the topology, which libtpu or XLA's CUDA compiler can compile for."""
    return _gpus(topology) if topology.on_gpu else _tpus(topology)


def hbm_bytes(topology: Topology) -> float:
    """The bytes of a device's memory that a program may use.

    On a GPU this is the share that JAX's allocator takes: XLA_CLIENT_MEM_FRACTION, formerly named
    XLA_PYTHON_CLIENT_MEM_FRACTION, or 0.75. Raises `UserError` if the variable is not a fraction.
    """
    if not topology.on_gpu:
        return topology.chip.hbm_bytes
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if value := os.environ.get(name):
            try:
                fraction = float(value)
            except ValueError:
                fraction = math.nan
            if not 0 < fraction < math.inf:
                raise UserError(f"{name}={value}: must be a fraction of the memory, such as 0.75")
            return _MEMORY * fraction
    return _MEMORY * 0.75


def _tpus(topology: Topology) -> list[Any]:
    pod, shape = topology.pod, topology.shape
    rings = [side % pod.rings == 0 for side in shape]
    if pod.dimensions == 3:  # optical switches close the rings of all sides or of none
        rings = [all(rings)] * 3
    options: dict[str, Any] = {
        "chip_config_name": pod.config,
        "chips_per_host_bounds": (1, 1, 1) if shape == (1, 1) else (2, 2, 1),
        "wrap": (*rings, *[False] * (3 - pod.dimensions)),
    }
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    return topologies.get_topology_desc(topology.name, "tpu", **options).devices


def _gpus(topology: Topology) -> list[Any]:
    # With the CUDA plugin and without a GPU, JAX compiles for a described target if it runs on the
    # CPU (JAX_PLATFORMS=cpu; jax-ml/jax#23971).
    (count,) = topology.shape
    hosts, each = max(1, count // _HOST), min(count, _HOST)
    return topologies.get_topology_desc(
        platform="cuda", target_config=_H100, topology=f"1x{hosts}x{each}"
    ).devices
