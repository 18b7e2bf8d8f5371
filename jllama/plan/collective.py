"""The collectives of a compiled program: what each one moves, and among which devices."""

import dataclasses
import math
import re

import numpy as np

from jllama.plan import hlo
from jllama.plan.hlo import Array, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a collective moves; a collective of several arrays is several of these.

    Attributes:
      kind: one of `KINDS`. "send" goes to another slice. An all-reduce that the TPU's compiler
        fused with the slice of its result is a "reduce-scatter".
      array: the whole array: what a gather makes, or what is summed, scattered, sent.
      ways: devices in a group.
      groups: which devices take part, as the program writes it.
      scope: where in the traced function it comes from.
      times: how often it runs in a step.
      asynchronous: whether the compiler lets other work run meanwhile.
    """

    kind: str
    array: Array
    ways: int
    groups: str
    scope: str
    times: int
    asynchronous: bool

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time."""
        share = (self.ways - 1) / self.ways if self.ways else 1
        factors = {"all-reduce": 2 * share, "collective-permute": 1, "send": 1}
        return self.array.bytes * factors.get(self.kind, share)


def kind_of(i: Instruction, computation: str) -> str | None:
    """The kind of an instruction of `computation`; None if it is no collective."""
    kind = i.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    return (
        "reduce-scatter" if kind == "all-reduce" and "all-reduce-scatter" in computation else kind
    )


def arrays_of(i: Instruction, kind: str) -> list[Array]:
    """The arrays that a collective instruction moves, each whole."""
    elements = hlo.tuple_elements(i.type)
    if kind == "send":
        return hlo.arrays(elements[0])
    # A start's type is (operands, result, ...), but for an all-reduce.
    start = i.opcode.endswith("-start") and i.opcode != "all-reduce-start"
    arrays = hlo.arrays(elements[1] if start else i.type)
    if i.opcode.startswith("reduce-scatter"):  # its result is a part of what is summed
        ways = len(members_of(groups_of(i)) or ())
        arrays = [dataclasses.replace(a, shape=(ways, *a.shape)) for a in arrays]
    return arrays


def groups_of(i: Instruction) -> str:
    """The groups of devices of a collective instruction, as the program writes them."""
    found = re.search(
        r"(?:replica_groups|source_target_pairs)=(\{\{.*?\}\}|mesh\S* \{[^}]*\}|\[\S*\])", i.rest
    )
    return found[1] if found else ""


def members_of(groups: str) -> list[int] | None:
    """The devices of the first group; None where the program does not say."""
    if groups.startswith("{{"):
        return [int(n) for n in groups[2:].split("}")[0].split(",") if n]
    if iota := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups):
        sizes = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else range(len(sizes))
        devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
        return devices.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", groups)}
    along = re.search(r"\{(.*)\}", groups)
    axes = re.findall(r"'(\w+)'", along[1]) if along else []
    if not axes or not set(axes) <= sizes.keys():
        return None
    devices = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    names = list(sizes)
    rest = [name for name in names if name not in axes]
    grouped = devices.transpose([names.index(name) for name in (*axes, *rest)])
    return grouped.reshape(math.prod(sizes[a] for a in axes), -1)[:, 0].tolist()
