"""TPU chips to compile for, of which none needs to be there."""

import os
from typing import Any

import pytest
from jax.experimental import topologies


def devices(topology: str, **options: Any) -> list[Any]:
    """The devices of a topology such as "v5e:2x4"; skips the test where libtpu is missing."""
    # No chip is taken: several test processes may compile at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except (RuntimeError, NotImplementedError) as e:
        pytest.skip(f"no TPU compiler here: {str(e).splitlines()[0]}")
