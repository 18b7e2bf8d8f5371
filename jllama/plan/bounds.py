"""Lower bounds of a step's time from what it must compute, touch and send.

Each is a count over a published peak (`jllama.hardware`); the step cannot be faster than any of
them. What is done twice or waits (recomputation, saved activations, latency) makes it slower.
docs/planning.md has the formulas.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jllama.config import Config
from jllama.flops import BYTES, train_flops_per_token
from jllama.hardware import Chip

_GRADIENT = 4  # bytes: gradients and their sums over devices are float32


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter as the mesh holds it.

    Attributes:
      name: dotted path.
      elements: of the whole of it.
      axes: the mesh axes that share it out.
    """

    name: str
    elements: int
    axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one device must touch and send in a step."""

    hbm: float
    interconnect: float
    network: float


def model_flops(config: Config) -> float:
    """Model FLOPs of a step: all rows, each as one document, forward and backward."""
    tokens = config.training.batch_size * config.data.length
    return tokens * train_flops_per_token(config.model, config.data.length)


def traffic(
    config: Config,
    mesh: Mapping[str, int],
    slices: int,
    parameters: Sequence[Parameter],
    state_bytes: int,
) -> Traffic:
    """What a step touches and sends, per device.

    Args:
      mesh: sizes of the mesh axes.
      slices: parts of the devices between which there is only the data-centre network; they are
        along `replica`.
      state_bytes: parameters and optimizer state of one device.
    """
    passes = config.training.accumulate
    item = BYTES[config.compute.dtype]
    # Memory: the state is read and written, the gradient written and read (its norm is needed
    # before its first use), the weights read by the products of each pass, forward and backward.
    hbm = 2.0 * state_bytes
    links = network = 0.0
    for p in parameters:
        # Tensor parallel devices multiply with their own part; the others gather the rest.
        own = p.elements / _ways(mesh, [a for a in p.axes if a == "tensor"])
        gathered = _ways(mesh, [a for a in p.axes if a != "tensor"])
        stored = own / gathered
        hbm += 2 * stored * _GRADIENT
        # Rows of the embedding are looked up where they lie; the head, like a tied embedding, is
        # gathered once a pass, for the loss makes its gradient in the forward pass.
        table = p.name.partition(".")[0] in ("embedding", "head")
        multiplied = not table or p.name.startswith("head") or config.model.tie_embeddings
        uses = 0 if not multiplied else 1 if table else 2
        hbm += passes * uses * own * item
        if multiplied:
            links += passes * uses * _gather(own * item, gathered)
            links += passes * _gather(own * _GRADIENT, gathered)
        # Devices with the same part and other rows add up their gradients.
        same = [a for a in ("replica", "fsdp", "context") if a not in p.axes]
        inside = _ways(mesh, same) // (slices if "replica" in same else 1)
        links += passes * 2 * _gather(stored * _GRADIENT, inside)
        network += passes * 2 * _gather(stored * _GRADIENT / inside, slices)
    links += _activations(config, mesh)
    return Traffic(hbm, links, network)


def _activations(config: Config, mesh: Mapping[str, int]) -> float:
    """Bytes of a step's activations that one device sends."""
    m, item = config.model, BYTES[config.compute.dtype]
    tensor, context = mesh["tensor"], mesh["context"]
    rows = config.training.batch_size / (mesh["replica"] * mesh["fsdp"])
    # Attention and MLP each gather their input over `tensor` and scatter their output's sum; the
    # backward pass does the same, and so does the loss once.
    stream = rows * config.data.length / context * m.hidden_dim * item
    sent = (8 * m.num_layers + 2) * _gather(stream, tensor)
    # Keys and values are gathered over `context`, again for the backward pass, and their gradients
    # are summed. Fewer heads than tensor ways: each device has those of its own queries.
    heads = m.num_kv_heads / math.gcd(m.num_kv_heads, tensor)
    keys_values = 2 * rows * config.data.length * heads * m.head_dim * item
    return sent + 3 * m.num_layers * _gather(keys_values, context)


def _ways(mesh: Mapping[str, int], axes: Sequence[str]) -> int:
    return math.prod(mesh[a] for a in axes)


def _gather(size: float, ways: int) -> float:
    """Bytes that each of `ways` devices sends so that all have `size` of which each had a part.

    As many to add up `size` from each, and leave each a part of the sum; both, to leave all of it.
    """
    return size * (ways - 1) / ways


def seconds(config: Config, devices: int, chip: Chip, counted: Traffic) -> dict[str, float]:
    """Lower bounds by resource, in seconds, of those that are used and whose peak is published."""
    rates = {
        "compute": (model_flops(config) / devices, chip.flops),
        "hbm": (counted.hbm, chip.hbm_bandwidth),
        "interconnect": (counted.interconnect, chip.ici_bandwidth),
        "network": (counted.network, chip.dcn_bandwidth),
    }
    return {name: amount / rate for name, (amount, rate) in rates.items() if amount and rate}
