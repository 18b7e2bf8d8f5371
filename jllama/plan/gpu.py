"""H100s that are not there: what XLA's CUDA compiler must know of them.

With the CUDA plugin installed and no GPU, JAX compiles for a described target when it runs on the
CPU itself (`JAX_PLATFORMS=cpu`; jax-ml/jax#23971). Nothing is tuned by measuring, and cuDNN's fused
attention, which asks the device, is not available.
"""

import importlib.util
import os
from typing import Any

from jllama.errors import UserError
from jllama.plan.topology import Topology

_HOST = 8  # GPUs
_MEMORY = 84_942_979_072  # bytes that the driver reports of an H100 SXM

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


def check_plugin() -> None:
    """Raises `UserError` when there is no CUDA compiler."""
    if not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13)):
        raise UserError(
            "planning for a GPU takes JAX's CUDA compiler, and no GPU:"
            " pip install -c requirements.txt -e '.[cuda]'"
        )


def memory_bytes() -> float:
    """What JAX's allocator takes of the memory: XLA_PYTHON_CLIENT_MEM_FRACTION, by default 0.75."""
    return _MEMORY * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or 0.75)


def gpu_devices(topology: Topology) -> list[Any]:
    """The devices of XLA's ahead-of-time compiler."""
    from jax.experimental import topologies  # noqa: PLC0415

    (count,) = topology.shape
    hosts, each = max(1, count // _HOST), min(count, _HOST)
    return topologies.get_topology_desc(
        platform="cuda", target_config=_H100, topology=f"1x{hosts}x{each}"
    ).devices
