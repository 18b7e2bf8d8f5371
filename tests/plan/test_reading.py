"""What the plan adds up for devices."""

import jax
import recipes

from jllama.config import MeshConfig, ShardingConfig
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.plan.step import _reading, bytes_per_device
from jllama.train.state import base_shapes, define_state

LORA = (
    "training.init_from=unread",
    "compute.dtype=bfloat16",
    "adapt.kind=lora",
    "adapt.rank=4",
    "adapt.alpha=4",
)


def test_a_base_is_counted_while_it_is_read_a_matrix_at_a_time():
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), ShardingConfig())
    whole = recipes.in_memory(*LORA, num_layers=16, hidden_dim=128, ffn_dim=512)
    assert _reading(whole, placement, 0) == 0
    config = recipes.in_memory(
        *LORA, "adapt.quantize=int8", num_layers=16, hidden_dim=128, ffn_dim=512
    )
    frozen = bytes_per_device(define_state(config, placement).frozen)
    base = base_shapes(config, placement)
    largest = max(bytes_per_device(leaf) for leaf in jax.tree.leaves(base))
    assert largest == 16 * 128 * 512 * 2
    # The matrix as it was read and the float32 copy that is rounded, whole or in part.
    assert largest <= _reading(config, placement, frozen) - frozen <= 3.1 * largest
