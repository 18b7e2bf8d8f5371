"""Reduce-scatters in stages, one for each dimension of the torus."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu

from jllama.config import MeshConfig, ShardingConfig
from jllama.parallel import product
from jllama.parallel.mesh import abstract_mesh, make_mesh, scatter_stages
from jllama.parallel.sharding import Placement


def stages_of(topology, axes=("fsdp",), options=(), **sizes):
    options = {"chips_per_host_bounds": (2, 2, 1)} | dict(options)
    mesh = make_mesh(MeshConfig(**sizes), tpu.devices(topology, **options))
    return scatter_stages(mesh, axes)


@pytest.mark.parametrize(
    "topology,sizes,axes,stages",
    [
        ("v5e:2x2", {}, ("fsdp",), (2, 2)),
        ("v5e:2x4", {}, ("fsdp",), (4, 2)),  # JAX would arrange these eight, and 4x4, as a ring
        ("v5e:4x4", {}, ("fsdp",), (4, 4)),
        ("v5e:16x16", {}, ("fsdp",), (16, 16)),
        ("v5e:4x4", {"tensor": 4}, ("fsdp",), (4,)),
        ("v5e:4x4", {"context": 2}, ("fsdp", "context"), (2, 4, 2)),  # a side holds two axes
        ("v5p:2x2x4", {}, ("fsdp",), (4, 2, 2)),
        ("v5p:8x8x8", {}, ("fsdp",), (8, 8, 8)),
        ("v5p:8x8x8", {"tensor": 8}, ("fsdp",), (8, 8)),
        ("v5p:4x4x8", {"context": 16}, ("fsdp", "context"), (8, 4, 4)),
    ],
)
def test_a_stage_runs_along_one_dimension_of_the_torus(topology, sizes, axes, stages):
    assert stages_of(topology, axes, **sizes) == stages


def test_each_slice_of_several_has_the_same_stages():
    options = {"num_slices": 2}
    assert stages_of("v5e:4x4", options=options, replica=2) == (4, 4)


def test_devices_in_another_order_and_other_platforms_have_one_stage():
    assert scatter_stages(make_mesh(MeshConfig()), ("fsdp",)) == (8,)
    assert scatter_stages(abstract_mesh(MeshConfig(), 16), ("fsdp",)) == (16,)
    chips = tpu.devices("v5e:4x4")
    mesh = make_mesh(MeshConfig(), chips)
    ring = [0, 1, 2, 3, 7, 6, 5, 9, 10, 11, 15, 14, 13, 12, 8, 4]
    shuffled = jax.sharding.Mesh(
        mesh.devices.reshape(-1)[ring].reshape(mesh.devices.shape), mesh.axis_names
    )
    assert scatter_stages(shuffled, ("fsdp",)) == (16,)


SIZES = {"fsdp": 4, "tensor": 2}
SHAPES = [(16, 3, 5), (3, 16, 5), (2, 3, 16), (16,), (1, 16, 5), (3, 16)]


@pytest.mark.parametrize("stages", [(8,), (2, 4), (4, 2), (2, 2, 2)])
@pytest.mark.parametrize("in_stages", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_does_not_depend_on_the_stages(monkeypatch, shape, in_stages, stages):
    """On whole numbers, whose sums are exact in any order."""
    monkeypatch.setattr(product, "scatter_stages", lambda mesh, axes: stages)
    placement = Placement(
        make_mesh(MeshConfig(**SIZES)), ShardingConfig(), scatter_in_stages=in_stages
    )
    dimension = shape.index(16)
    axes = ("fsdp", "tensor")
    parts = tuple(axes if d == dimension else () for d in range(len(shape)))
    terms = np.random.default_rng(0).integers(-100, 100, (8, *shape)).astype(np.float32)

    def run(terms):
        with placement.active():
            scatter = placement.per_device(
                lambda x: product.reduce(x[0], axes, parts),
                placement.partition(axes),
                placement.partition(*parts),
            )
            return scatter(terms)

    np.testing.assert_array_equal(jax.jit(run)(terms), terms.sum(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stages", [(8,), (2, 2, 2)])
def test_gradients_are_sent_as_rounded_as_the_placement_says(monkeypatch, dtype, stages):
    """Beside the sum in float64. A term and the seven sums on its way are rounded to 8 bits."""
    monkeypatch.setattr(product, "scatter_stages", lambda mesh, axes: stages)
    placement = Placement(
        make_mesh(MeshConfig()), ShardingConfig(), gradient_dtype=dtype, scatter_in_stages=True
    )
    terms = np.random.default_rng(1).normal(size=(8, 64, 32)).astype(np.float32)

    def run(terms, gradient):
        with placement.active():
            return placement.per_device(
                lambda x: product.reduce(x[0], ("fsdp",), (("fsdp",), ()), gradient),
                placement.partition(("fsdp",)),
                placement.partition(("fsdp",)),
            )(terms)

    wanted = terms.astype(np.float64).sum(0)
    scale = np.abs(terms).astype(np.float64).sum(0)  # of what is rounded

    def error(gradient):
        got = jax.jit(run, static_argnums=1)(terms, gradient)
        assert got.dtype == jnp.float32
        return np.max(np.abs(np.asarray(got, np.float64) - wanted) / scale)

    least, most = (0, 3e-7) if dtype == "float32" else (1e-4, 8 * 2**-9)
    assert least <= error(True) < most
    assert error(False) < 3e-7  # an activation is sent as it is
