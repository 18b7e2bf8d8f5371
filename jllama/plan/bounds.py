"""Lower bounds of a step's time from what it must compute, touch and send.

Each is a count over a published peak (`jllama.chips`); the step cannot be faster than any of
them. What is done twice or waits (recomputation, saved activations, latency) makes it slower.
docs/planning.md has the formulas.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jllama.adapt.lora import adapted_flops_per_token
from jllama.chips import Chip
from jllama.config import Config
from jllama.flops import BYTES

_GRADIENT = 4  # bytes: gradients and their sums over devices are float32


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter as the mesh holds it.

    Attributes:
      name: dotted path.
      shape: of the whole of it.
      parts: the mesh axes that share out each dimension.
      trained: it has a gradient.
      item: bytes of an element where it is stored in fewer than the computation's.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, ...], ...]
    trained: bool = True
    item: float | None = None

    @property
    def is_table(self) -> bool:
        """Embedding or head, [V,D]."""
        return self.name.split(".")[0] in ("embedding", "head")

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for part in self.parts for axis in part)

    @property
    def kept(self) -> tuple[str, ...]:
        """Axes whose devices multiply with their own part; over the others it is gathered."""
        axes = self.parts[0] if self.is_table else self.axes
        return tuple(axis for axis in axes if axis == "tensor")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one device must touch and send in a step."""

    hbm: float
    interconnect: float
    network: float


def model_flops(config: Config) -> float:
    """Model FLOPs of a step: all rows, each as one document, forward and backward."""
    tokens = config.training.batch_size * config.data.length
    return tokens * adapted_flops_per_token(config.model, config.adapt, config.data.length)


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
      state_bytes: what is trained, and optimizer state, of one device.
    """
    passes = config.training.accumulate
    # Memory: the state is read and written, the gradient written and read (its norm is needed
    # before its first use), the weights read by the products of each pass, forward and backward.
    hbm = 2.0 * state_bytes
    links = network = 0.0
    for p in parameters:
        # What no loop over blocks owns has its gradients added up over the microbatches first: the
        # compiler takes their sum over devices out of the loop.
        sums = passes if p.name.startswith("layers.") else 1
        own = math.prod(p.shape) / _ways(mesh, p.kept)
        gathered = _ways(mesh, [a for a in p.axes if a not in p.kept])
        stored = own / gathered
        item = p.item or BYTES[config.compute.dtype]
        # The head, like a tied embedding, is gathered once a pass: the loss makes its gradient in
        # the forward pass. Rows of an embedding are looked up, and summed, where they lie.
        multiplied = not p.is_table or p.name.startswith("head") or config.model.tie_embeddings
        uses = (1 if p.is_table else 2) if multiplied else 0
        hbm += passes * uses * own * item
        links += passes * uses * _share(own * item, gathered)
        if not p.trained:
            continue
        hbm += 2 * stored * _GRADIENT
        if multiplied:
            links += sums * _share(own * _GRADIENT, gathered)
        # Devices with the same part and other rows add up their gradients; replicas once, after
        # their microbatches.
        same = [a for a in ("fsdp", "context") if a not in p.axes]
        links += sums * 2 * _share(stored * _GRADIENT, _ways(mesh, same))
        if "replica" not in p.axes:
            inside = mesh["replica"] // slices
            links += 2 * _share(stored * _GRADIENT, inside)
            network += 2 * _share(stored * _GRADIENT / inside, slices)
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
            sent += 2 * _share(stream, _ways(mesh, p.kept))  # so does the loss, once
        if p.name.startswith("embedding"):
            # What was looked up by width goes to its rows, and its gradient back.
            sent += 2 * _share(stream / tensor, _ways(mesh, p.parts[1]))
    # Keys and values are gathered over `context`, again for the backward pass, and their gradients
    # are summed. Fewer heads than tensor ways: each device has those of its own queries.
    heads = m.num_kv_heads / math.gcd(m.num_kv_heads, tensor)
    keys_values = 2 * rows * config.data.length * heads * m.head_dim * item
    return sent + 3 * m.num_layers * _share(keys_values, context)


def _ways(mesh: Mapping[str, int], axes: Sequence[str]) -> int:
    return math.prod(mesh[a] for a in axes)


def _share(size: float, ways: int) -> float:
    """Bytes that each of `ways` devices sends so that all have `size`, of which each had a part.

    As many to add up `size` from each and leave each a part of the sum; both to leave all of it.
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
