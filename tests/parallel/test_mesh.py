"""Devices to mesh: sizes, slices, and the chips' own order."""

import itertools
import math
import types

import jax
import numpy as np
import pytest
import tpu

from jllama.config import MeshConfig
from jllama.errors import UserError
from jllama.parallel.mesh import AXES, abstract_mesh, make_mesh


def sizes(mesh):
    return {axis: size for axis, size in mesh.shape.items() if size > 1}


def test_minus_one_takes_what_is_left():
    mesh = make_mesh(MeshConfig(fsdp=-1, tensor=2), jax.devices()[:8])
    assert dict(mesh.shape) == {"replica": 1, "fsdp": 4, "tensor": 2, "context": 1}
    assert sizes(make_mesh(MeshConfig(fsdp=2, context=-1), jax.devices()[:8])) == {
        "fsdp": 2,
        "context": 4,
    }
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape)["fsdp"] == 1


@pytest.mark.parametrize("given", [{"fsdp": 3}, {"fsdp": 4, "tensor": 4}])
def test_a_mesh_that_does_not_fill_the_devices_is_an_error(given):
    for make, devices in ((make_mesh, jax.devices()[:8]), (abstract_mesh, 8)):
        with pytest.raises(UserError, match=r"does not fill 8 devices; set one size to -1$"):
            make(MeshConfig(**given), devices)
    # The way out; the other size must divide the devices.
    assert dict(abstract_mesh(MeshConfig(**{**given, "fsdp": -1}), 8).shape)["fsdp"] > 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tensor": 5}, "mesh.tensor=5: 16 devices do not divide by it; they do by 4 or 8"),
        ({"tensor": 32}, "mesh.tensor=32: 16 devices do not divide by it; they do by 16"),
        (
            {"fsdp": 3, "tensor": 4, "context": -1},
            "mesh.fsdp=3, mesh.tensor=4: 16 devices do not divide by their product, 12;"
            " they do by 8 or 16",
        ),
    ],
    ids=str,
)
def test_sizes_that_leave_no_whole_number_are_named_with_what_would_do(given, said):
    with pytest.raises(UserError) as error:
        abstract_mesh(MeshConfig(**given), 16)
    assert str(error.value) == said
    for size in map(int, said.rpartition("they do by ")[2].split(" or ")):
        abstract_mesh(MeshConfig(tensor=size), 16)


def test_a_mesh_without_devices_has_the_same_axes():
    config = MeshConfig(replica=2, fsdp=-1, tensor=2)
    there, abstract = make_mesh(config, jax.devices()[:8]), abstract_mesh(config, 8)
    assert there.shape == abstract.shape
    assert there.axis_types == abstract.axis_types
    assert sizes(abstract_mesh(MeshConfig(fsdp=-1, tensor=8), 4096)) == {"fsdp": 512, "tensor": 8}


def fakes(slices, each):
    return [
        types.SimpleNamespace(platform="tpu", slice_index=s, id=s * each + i)
        for s in range(slices)
        for i in range(each)
    ]


@pytest.mark.parametrize(("replica", "fsdp"), [(1, -1), (2, -1), (-1, 8)])
def test_only_replica_goes_from_slice_to_slice(replica, fsdp):
    config = MeshConfig(replica=replica, fsdp=fsdp)
    for make in (lambda: make_mesh(config, fakes(4, 4)), lambda: abstract_mesh(config, 16, 4)):
        with pytest.raises(UserError) as error:
            make()
        said = str(error.value)
        assert "4 slices" in said
        assert "set mesh.replica to 4 or a multiple" in said
        for ways in (4, 8):
            abstract_mesh(MeshConfig(replica=ways, fsdp=-1), 16, 4)
        assert "\n" not in said


def coordinates(mesh):
    return np.vectorize(lambda d: np.dot(d.coords, (1, 100, 10_000)), otypes=[int])(mesh.devices)


def test_neighbours_on_the_tensor_axis_are_neighbouring_chips():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=4), tpu.devices("v5e:4x4"))
    assert AXES[-1] == "tensor"
    steps = np.abs(np.diff(coordinates(mesh), axis=-1))
    assert set(steps.flat) <= {1, 100}


def test_an_axis_that_is_no_side_of_the_torus_is_laid_out_all_the_same():
    mesh = make_mesh(MeshConfig(fsdp=32, tensor=2), tpu.devices("v5p:4x4x4"))
    assert sizes(mesh) == {"fsdp": 32, "tensor": 2}
    assert len(set(coordinates(mesh).flat)) == 64


def shapes(count):
    """Every (replica, fsdp, context, tensor) that fills `count` devices."""
    for sizes in itertools.product(*[[n for n in range(1, count + 1) if count % n == 0]] * 4):
        if math.prod(sizes) == count:
            yield dict(zip(("replica", "fsdp", "context", "tensor"), sizes, strict=True))


MEGACORE = {"chip_config_name": "megacore"}  # the two cores of a chip are one device


@pytest.mark.parametrize(
    ("topology", "options"),
    [
        ("v4:2x2x2", MEGACORE),
        ("v4:2x2x4", MEGACORE),
        ("v5p:2x2x4", {}),
        ("v5p:2x4x4", {}),
        ("v5e:2x4", {}),
        ("v5e:4x4", {}),
        ("v6e:4x8", {}),
    ],
    ids=str,
)
def test_every_shape_that_fills_a_slice_is_a_mesh_of_all_its_chips(topology, options):
    chips = tpu.devices(topology, **options)
    for given in shapes(len(chips)):
        mesh = make_mesh(MeshConfig(**given), chips)
        assert dict(mesh.shape) == given
        assert {d.id for d in mesh.devices.flat} == {d.id for d in chips}


@pytest.mark.parametrize(
    ("topology", "given"),
    [
        ("v4:2x2x1", {"fsdp": 4, "tensor": 2}),  # two devices a chip: AssertionError
        ("v5p:4x4x20", {"fsdp": 10, "tensor": 32}),  # a factor of 10 gets lost
        ("v5p:4x4x28", {"fsdp": 56, "tensor": 8}),
    ],
    ids=str,
)
def test_a_shape_that_jax_has_no_layout_for_is_a_mesh_all_the_same(topology, given):
    chips = tpu.devices(topology)
    mesh = make_mesh(MeshConfig(**given), chips)
    assert sizes(mesh) == given
    assert {d.id for d in mesh.devices.flat} == {d.id for d in chips}


@pytest.mark.parametrize("replica", [2, 4])
def test_every_replica_lies_within_one_slice(replica):
    chips = tpu.devices("v5e:4x4", num_slices=2)
    mesh = make_mesh(MeshConfig(replica=replica, fsdp=-1, tensor=2), chips)
    assert sizes(mesh) == {"replica": replica, "fsdp": 16 // replica, "tensor": 2}
    of_slices = [{d.slice_index for d in part.flat} for part in mesh.devices]
    assert all(len(one) == 1 for one in of_slices)
    assert set.union(*of_slices) == {0, 1}


def test_two_slices_without_replica_are_an_error():
    chips = tpu.devices("v5e:4x4", num_slices=2)
    with pytest.raises(UserError, match=r"set mesh\.replica to 2"):
        make_mesh(MeshConfig(fsdp=-1), chips)
