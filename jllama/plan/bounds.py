"""Lower bounds of a step's time, from its FLOPs, memory traffic and communication.

Each is an amount divided by a published peak (`jllama.chips`); the step cannot be faster than any
of them. Recomputation, saved activations and latency, which are not counted, make it slower.
docs/planning.md has the formulas.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jllama.adapt.lora import adapted_flops_per_token
from jllama.chips import Chip
from jllama.config import Config
from jllama.flops import BYTES

_GRADIENT = 4  # bytes of an element: a device's gradients are float32


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter and its sharding.

    Attributes:
      name: dotted path.
      shape: the global shape.
      parts: the mesh axes over which each dimension is sharded.
      trained: whether it has a gradient.
      item: bytes of a stored element; None means those of the compute dtype.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, ...], ...]
    trained: bool = True
    item: float | None = None

    @property
    def is_table(self) -> bool:
        """Whether it is the embedding or the head, [V,D]."""
        return self.name.split(".")[0] in ("embedding", "head")

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes over which it is sharded."""
        return tuple(axis for part in self.parts for axis in part)

    @property
    def local_axes(self) -> tuple[str, ...]:
        """The axes along which each device multiplies with its shard; the others are gathered."""
        axes = self.parts[0] if self.is_table else self.axes
        return tuple(axis for axis in axes if axis == "tensor")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one device reads and writes in its memory, and sends, in a step."""

    hbm: float
    interconnect: float
    network: float


def model_flops(config: Config) -> float:
    """Model FLOPs of a step over all rows, forward and backward; a row is taken as one document."""
    tokens = config.training.batch_size * config.data.length
    return tokens * adapted_flops_per_token(config.model, config.adapt, config.data.length)


def traffic(
    config: Config,
    mesh: Mapping[str, int],
    slices: int,
    parameters: Sequence[Parameter],
    state_bytes: int,
) -> Traffic:
    """The traffic of one device in a step.

    Args:
      mesh: sizes of the mesh axes.
      slices: number of slices, which lie along `replica` and are joined by the data-centre network.
      state_bytes: bytes of trained parameters and optimizer state on one device.
    """
    passes = config.training.accumulate
    stored_item = BYTES[config.compute.param_dtype]
    # Memory: the state is read and written; the gradient is written and read (its norm is needed
    # before its first use); the products of each pass read the weights, forward and backward.
    hbm = 2.0 * state_bytes
    links = network = 0.0
    for p in parameters:
        # Gradients outside of the loop over layers are first added up over the microbatches,
        # because the compiler moves their sum over devices out of the loop.
        sums = passes if p.name.startswith("layers.") else 1
        used = math.prod(p.shape) / _ways(mesh, p.local_axes)  # elements that a device multiplies
        gathered = _ways(mesh, [a for a in p.axes if a not in p.local_axes])
        stored = used / gathered
        item = p.item or BYTES[config.compute.dtype]
        # The head, like a tied embedding, is gathered once a pass, because the loss computes its
        # gradient in the forward pass. Rows of an embedding are looked up and summed in place.
        multiplied = not p.is_table or p.name.startswith("head") or config.model.tie_embeddings
        uses = (1 if p.is_table else 2) if multiplied else 0
        hbm += passes * uses * used * item
        links += passes * uses * _share(used * item, gathered)
        if not p.trained:
            continue
        hbm += 2 * stored * _GRADIENT
        sent = min(BYTES[config.training.gradient_dtype], stored_item)
        # The lookup's gradient and the norms' are summed by the partitioner, as they are.
        sent = sent if multiplied and "norm" not in p.name else stored_item
        if multiplied:
            links += sums * _share(used * sent, gathered)
        # Devices with the same shard and different rows add up their gradients; replicas do it
        # once, after their microbatches.
        same = [a for a in ("fsdp", "context") if a not in p.axes]
        links += sums * 2 * _share(stored * sent, _ways(mesh, same))
        if "replica" not in p.axes:
            inside = mesh["replica"] // slices
            links += 2 * _share(stored * sent, inside)
            network += 2 * _share(stored * sent / inside, slices)
    return Traffic(hbm, links + _activations(config, mesh, parameters), network)


def _activations(config: Config, mesh: Mapping[str, int], parameters: Sequence[Parameter]) -> float:
    """Bytes of a step's activations that one device sends."""
    m, item = config.model, BYTES[config.compute.dtype]
    tensor, context = mesh["tensor"], mesh["context"]
    rows = config.training.batch_size / (mesh["replica"] * mesh["fsdp"])
    stream = rows * config.data.length / context * m.hidden_dim * item
    # Attention and MLP each gather their input over `tensor` and scatter their output's sum; the
    # backward pass does the same.
    sent = 8 * m.num_layers * _share(stream, tensor)
    for p in parameters:
        if p.is_table and (p.name.startswith("head") or m.tie_embeddings):
            sent += 2 * _share(stream, _ways(mesh, p.local_axes))  # the loss does so once
        if p.name.startswith("embedding"):
            # A device looks up its shard of the width, and sends it to the devices of the rows;
            # their gradients come back.
            sent += 2 * _share(stream / tensor, _ways(mesh, p.parts[1]))
    # Keys and values are gathered over `context`, and again for the backward pass, and their
    # gradients are summed. With fewer heads than tensor ways each device has the heads that its
    # queries need.
    heads = m.num_kv_heads / math.gcd(m.num_kv_heads, tensor)
    keys_values = 2 * rows * config.data.length * heads * m.head_dim * item
    return sent + 3 * m.num_layers * _share(keys_values, context)


def _ways(mesh: Mapping[str, int], axes: Sequence[str]) -> int:
    return math.prod(mesh[a] for a in axes)


def _share(size: float, ways: int) -> float:
    """Bytes that each of `ways` devices sends to all-gather an array of `size` bytes.

    A reduce-scatter sends as many, and an all-reduce sends both.
    """
    return size * (ways - 1) / ways


def seconds(config: Config, devices: int, chip: Chip, counted: Traffic) -> dict[str, float]:
    """Lower bounds in seconds, by resource, for resources that are used and have a known peak."""
    rates = {
        "compute": (model_flops(config) / devices, chip.flops),
        "hbm": (counted.hbm, chip.hbm_bandwidth),
        "interconnect": (counted.interconnect, chip.ici_bandwidth),
        "network": (counted.network, chip.dcn_bandwidth),
    }
    return {name: amount / rate for name, (amount, rate) in rates.items() if amount and rate}
