"""The interconnect bound against what the compiler's program sends."""

import functools

import pytest
import recipes
import tpu

from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.plan import bounds, step
from jllama.plan.program import collectives
from jllama.train.loss import causal_lm_loss
from jllama.train.state import define_state
from jllama.train.step import make_train_step

SIZES = {
    "vocab_size": 512, "hidden_dim": 512, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 128, "ffn_dim": 512, "max_length": 512,
}  # fmt: skip
QLORA = ("adapt={kind: lora, rank: 8, alpha: 8, quantize: int8}", "training.init_from=unread")


@pytest.mark.parametrize("accumulate,more", [(1, ()), (4, ()), (1, QLORA)])
def test_the_interconnect_bound_is_what_the_program_sends_but_for_little(
    no_cache, accumulate, more
):
    devices = tpu.devices("v5e:2x4")
    config = recipes.in_memory(
        "compute.dtype=bfloat16", "data.length=512", "mesh.tensor=2", "mesh.context=2",
        f"training.accumulate={accumulate}", *more, **SIZES,
    )  # fmt: skip
    placement = Placement(make_mesh(config.mesh, devices), config.sharding)
    definition = define_state(config, placement)
    loss = functools.partial(causal_lm_loss, config)
    compiled = (
        make_train_step(config, loss, definition, placement)
        .lower(
            definition.placed,
            definition.frozen,
            step.abstract_batch(config, placement, config.training.batch_size),
        )
        .compile()
    )
    program = sum(c.times * c.sent for c in collectives(compiled.as_text()))
    mesh = dict(placement.mesh.shape)
    bound = bounds.traffic(config, mesh, 1, step.parameters_of(definition), 0).interconnect
    assert 0.9 * program < bound <= program
