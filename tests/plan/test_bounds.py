"""Lower bounds against sums done by hand."""

import pytest
import recipes

from jllama.chips import CHIPS, Chip
from jllama.flops import train_flops_per_token
from jllama.plan import bounds
from jllama.plan.bounds import Parameter

V, D, F, L = 96, 48, 80, 2
ONE = {"replica": 1, "fsdp": 1, "context": 1, "tensor": 1}


def config(*overrides):
    return recipes.in_memory("compute.dtype=bfloat16", *overrides)


def traffic(parameters, mesh, *overrides, slices=1, state=0):
    return bounds.traffic(config(*overrides), ONE | mesh, slices, parameters, state)


def gate(*parts):
    return Parameter("layers.mlp.gate.kernel", (L, D, F), ((), *parts))


def test_one_device_sends_nothing():
    assert traffic([gate((), ())], {}).interconnect == 0


def test_memory_is_state_twice_gradient_twice_and_weights_in_two_passes():
    n = L * D * F
    got = traffic([gate((), ())], {}, "training.accumulate=4", state=1000)
    assert got.hbm == 2 * 1000 + 2 * 4 * n + 4 * (2 * n * 2)


def test_fsdp_gathers_bfloat16_twice_and_scatters_the_float32_gradient():
    n, share = L * D * F, 3 / 4
    got = traffic([gate(("fsdp",), ())], {"fsdp": 4}, "training.accumulate=2")
    assert got.interconnect == 2 * (2 * n * 2 * share + n * 4 * share)
    assert got.network == 0


def test_what_is_frozen_is_gathered_as_it_is_stored_and_has_no_gradient():
    n = L * D * F
    frozen = Parameter("layers.mlp.gate.kernel", (L, D, F), ((), ("fsdp",), ()), False, 0.5)
    got = traffic([frozen], {"fsdp": 4}, "training.accumulate=2")
    assert got.interconnect == 2 * 2 * n * 0.5 * 3 / 4
    assert got.hbm == 2 * 2 * n * 0.5


def test_tensor_parallel_devices_gather_their_own_part_and_the_stream():
    n, rows, length = L * D * F, 8 / 2, 12
    got = traffic([gate(("fsdp",), ("tensor",))], {"fsdp": 2, "tensor": 4})
    weights = (2 * 2 + 4) * n / 4 * (1 / 2)
    stream = 8 * L * (rows * length * D * 2) * (3 / 4)
    assert got.interconnect == weights + stream


def test_context_devices_gather_keys_and_values_and_add_up_gradients():
    n, rows, length, kv_width = L * D * F, 8 / 2, 12, 2 * 16
    got = traffic([gate(("fsdp",), ())], {"fsdp": 2, "context": 4})
    weights = (2 * 2 + 4) * n * (1 / 2)
    gradient = 2 * (n / 2) * 4 * (3 / 4)
    keys_values = 3 * L * 2 * (rows * length * kv_width * 2) * (3 / 4)
    assert got.interconnect == weights + gradient + keys_values


def test_slices_add_up_gradients_over_the_network_alone():
    n = L * D * F
    got = traffic([gate(("fsdp",), ())], {"replica": 4, "fsdp": 2}, slices=2)
    inside = 2 * (n / 2) * 4 * (1 / 2)  # two replicas in each slice
    assert got.interconnect == (2 * 2 + 4) * n * (1 / 2) + inside
    assert got.network == 2 * (n / 2 / 2) * 4 * (1 / 2)


def test_tables_are_looked_up_where_they_lie_and_the_head_is_gathered_once():
    n, rows, length = V * D, 8 / 2, 12
    embedding = Parameter("embedding.weight", (V, D), ((), ("fsdp",)))
    head = Parameter("head.weight", (V, D), ((), ("fsdp",)))
    looked_up = 2 * (rows * length * D * 2) * (1 / 2)
    assert traffic([embedding], {"fsdp": 2}).interconnect == looked_up
    assert traffic([head], {"fsdp": 2}).interconnect == (2 + 4) * n * (1 / 2)


def test_seconds_are_amounts_over_peaks_and_unused_or_unpublished_ones_are_left_out():
    chip = Chip("x", flops=1e6, hbm_bandwidth=10.0, ici_bandwidth=5.0)
    got = bounds.seconds(config(), 4, chip, bounds.Traffic(30.0, 0.0, 7.0))
    flops = 8 * 12 * train_flops_per_token(config().model, 12)
    assert got == {"compute": flops / 4 / 1e6, "hbm": 3.0}


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e"])
def test_a_tpu_has_every_peak_but_the_unpublished_network_of_v4(name):
    chip = CHIPS[name]
    peaks = (chip.flops, chip.hbm_bytes, chip.hbm_bandwidth, chip.ici_bandwidth)
    assert all(peaks) and (chip.dcn_bandwidth is None) == (name == "v4")
