"""Collectives of a compiled program, counted as often as they run."""

import dataclasses
import re

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|branch_computations)=(\{[^}]*\}|%[\w.-]+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a collective makes.

    Attributes:
      kind: "all-gather" and so on; an all-reduce that TPU's compiler fused with the slice of its
        result is a "reduce-scatter".
      array: the result on one device, as in "f32[7,64]"; `shape` and `dtype` are its parts.
      fused: of a reduce-scatter that was an all-reduce: `array` is what is summed, of which a
        device keeps a part.
      groups: which devices take part, as the program writes it.
      name: where in the traced function it comes from.
      times: how often it runs.
    """

    kind: str
    array: str
    groups: str
    name: str
    times: int
    fused: bool

    @property
    def dtype(self) -> str:
        return self.array.split("[")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in re.findall(r"\d+", self.array.split("[")[1]))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%([\w.-]+) .*\{$", line)
        if head:
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None:
            current.append(line)
    return found, entry


def _trips(line: str, parts: dict[str, list[str]]) -> int:
    """How often a loop runs: said by the compiler, or the constant that its condition compares."""
    if said := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(said[1])
    condition = parts[re.search(r"condition=%([\w.-]+)", line)[1]]
    (bound,) = {
        int(n) for c in condition for n in re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", c)
    }
    return bound


def collectives(text: str, kinds: tuple[str, ...] = _KINDS) -> list[Collective]:
    """The collectives of a compiled HLO module, each array of a combined one on its own."""
    instruction = re.compile(rf"= (?P<type>.*?) (?P<kind>{'|'.join(kinds)})(-start)?\(")
    parts, entry = _computations(text)
    found: dict[tuple, Collective] = {}

    def walk(computation: str, times: int, name: str, path: tuple) -> None:
        for number, line in enumerate(parts[computation]):
            said = re.search(r'op_name="([^"]*)"', line)
            here = said[1] if said else name
            if match := instruction.search(line):
                fused = "all-reduce-scatter" in computation
                kind = "reduce-scatter" if fused else match["kind"]
                groups = re.search(
                    r"(?:replica_groups|source_target_pairs)=(\{\{.*?\}\}|mesh\S* \{[^}]*\}|\S*\])",
                    line,
                )
                # An asynchronous collective of the TPU is written several times, as one chain.
                chain = re.search(r'chain_id="\d+"', line)
                for i, (dtype, shape) in enumerate(_ARRAY.findall(match["type"])):
                    key = (path, chain[0] if chain else (computation, number), i)
                    found[key] = Collective(
                        kind, f"{dtype}[{shape}]", groups[1] if groups else "", here, times, fused
                    )
            loop = " while(" in line
            for called in _CALLED.findall(line):
                for other in re.findall(r"%([\w.-]+)", called):
                    again = times * _trips(line, parts) if loop else times
                    walk(other, again, here, (*path, other) if loop else path)

    walk(entry, 1, "", ())
    return list(found.values())
