"""bfloat16 on a mesh gives the loss and gradients of one device, up to rounding."""

import math

import jax
import jax.numpy as jnp
import pytest
import recipes
import tiny

from jllama.config import MeshConfig
from jllama.model import llama
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.train.loss import causal_lm_loss

MESHES = [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "context": 2}]
CONFIG = recipes.in_memory(
    "compute.dtype=bfloat16", "data.length=32", "compute.attention={kind: blockwise, block: 8}"
)
ROUNDING = 2.0**-8  # the relative rounding error of bfloat16, which has 8 bits of mantissa


def place(sizes):
    devices = jax.devices()[: math.prod(sizes.values())]
    return Placement(make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), devices), CONFIG.sharding)


def loss_and_gradients(config, sizes):
    placement = place(sizes)
    params = jax.tree.map(
        lambda x, spec: jax.device_put(x, placement.sharding(spec.shape, spec.axes, "x")),
        tiny.params(config.model, 5.0),
        llama.param_specs(config.model, config.compute),
    )

    @jax.jit
    def run(params, batch):
        def mean(params):
            total, weight, _ = causal_lm_loss(config, params, (), batch, jax.random.key(0))
            return total / weight

        with placement.active():
            return jax.value_and_grad(mean)(params)

    loss, gradients = run(params, placement.put_batch(recipes.batch(config)))
    return float(loss), jax.device_get(gradients)


def distance(got, wanted):
    """The norm of a leaf's difference over the leaf's norm; of all leaves the largest."""
    ratios = jax.tree.map(
        lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), got, wanted
    )
    return max(jax.tree.leaves(ratios))


@pytest.fixture(scope="module")
def one_device():
    return loss_and_gradients(CONFIG, {"fsdp": 1})


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_bfloat16_step_on_eight_devices_equals_that_on_one(sizes, one_device):
    loss, gradients = loss_and_gradients(CONFIG, sizes)
    assert loss == pytest.approx(one_device[0], rel=ROUNDING / 4)
    assert distance(gradients, one_device[1]) < 8 * ROUNDING  # 3%: sums of parts are rounded too
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
