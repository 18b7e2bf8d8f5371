"""What one step of a compiled program does: its collectives, its cycles, and a model of its time.

Everything is counted as often as it runs: what is in a loop, as many times as the loop has trips. A
loop whose trips depend on data, such as attention's over blocks of keys, counts as one trip.
The compiler writes an asynchronous collective as a start and a done, or spreads it over a chain of
fusions, the products that run meanwhile; each counts once.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jllama.chips import Chip
from jllama.plan import hlo
from jllama.plan.collective import Collective, arrays_of, groups_of, kind_of, members_of
from jllama.plan.hlo import Instruction, Module


class Links(NamedTuple):
    """The links of a device.

    Attributes:
      one: bytes/s that it sends over one link to a neighbour; it has two along each dimension.
      dimensions: of the torus.
      network: bytes/s that it sends to other slices.
      places: the coordinates of each device, in the program's order; None if they are not known.
    """

    one: float
    dimensions: int
    network: float
    places: Sequence[Sequence[int]] | None

    @classmethod
    def of(
        cls, chip: Chip, share: float = 1.0, places: Sequence[Sequence[int]] | None = None
    ) -> "Links":
        """The published figures times `share`."""
        one = chip.ici_bandwidth / (2 * chip.torus) * share
        return cls(one, chip.torus, (chip.dcn_bandwidth or math.inf) * share, places)

    def along(self, members: Sequence[int] | None) -> tuple[int, ...]:
        """The dimensions of the torus along which these devices differ; all if that is unknown."""
        if self.places is None or not members or max(members) >= len(self.places):
            return tuple(range(self.dimensions))
        coordinates = zip(*(self.places[m][: self.dimensions] for m in members), strict=True)
        spanned = tuple(d for d, values in enumerate(coordinates) if len(set(values)) > 1)
        return spanned or tuple(range(self.dimensions))


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a program.

    Attributes:
      collectives: each array of each collective.
      uncounted_loops: loops whose trips depend on data; each counts as one trip.
      cycles: the compiler's estimate over all instructions that have one, loops multiplied in.
        Pallas kernels, which are attention's, have none.
      unestimated: fusions, as often as they run, whose cycles the compiler could not estimate;
        they count as 0.
      seconds: the modelled time; see `modelled_step`.
      exposed: the part of `seconds` in which a device only waits for a collective, by
        (kind, asynchronous).
    """

    collectives: list[Collective]
    uncounted_loops: int
    cycles: int
    unestimated: int
    seconds: float
    exposed: dict[tuple[str, bool], float]


def collectives(program: str | Module) -> list[Collective]:
    """The collectives of a compiled module, given as its text or parsed."""
    walk = _Walk(_parsed(program), None, math.inf)
    walk.run()
    return walk.collectives


def _parsed(program: str | Module) -> Module:
    return hlo.parse(program) if isinstance(program, str) else program


def modelled_step(
    program: str | Module,
    chip: Chip,
    share: float = 1.0,
    places: Sequence[Sequence[int]] | None = None,
) -> Step:
    """Models one step of a program for TPUs with `share` of the published bandwidth of the links.

    Instructions run in scheduled order and take the cycles that the compiler estimates. A
    collective takes the bytes that a device sends over the bandwidth of its links along the
    dimensions of the torus that the group spans, by `places`, the coordinates of the devices in the
    program's order; without them, of all its links. Those that share a dimension run one after the
    other. A permute takes one link. A synchronous collective is waited for where it stands, an
    asynchronous one where it is done. Attention kernels, memory that several instructions want at
    once, latency, and links that a slice lacks are left out.
    """
    links = Links.of(chip, share, places)
    walk = _Walk(_parsed(program), links, chip.flops / chip.flops_per_cycle)
    seconds = walk.run()
    return Step(
        walk.collectives,
        walk.uncounted_loops,
        walk.cycles,
        walk.unestimated,
        seconds,
        dict(walk.exposed),
    )


class _Walk:
    """Walks a module once, in scheduled order; what it finds is in its attributes."""

    def __init__(self, module: Module, links: Links | None, hertz: float):
        self.module, self.links, self.hertz = module, links, hertz
        self.cycles = self.unestimated = self.uncounted_loops = 0
        self.exposed: collections.Counter[tuple[str, bool]] = collections.Counter()
        self._found: dict[tuple, list[Collective]] = {}

    @property
    def collectives(self) -> list[Collective]:
        return [c for arrays in self._found.values() for c in arrays]

    def run(self) -> float:
        """Returns the modelled seconds."""
        return self._computation(self.module.entry, 1, (), "")

    def _computation(self, name: str, times: int, path: tuple[str, ...], scope: str) -> float:
        """Walks a computation that runs `times` times; returns the seconds of one run."""
        at = _Clock()
        for i in self.module.computations[name]:
            where = i.scope or scope
            if i.opcode == "while":
                trips = self._trips(name, i)
                body = i.attribute("body")
                inner = self._computation(body, times * trips, (*path, body), where)
                at.now += trips * inner
                continue
            if i.opcode == "call":
                at.now += self._computation(i.called, times, (*path, i.name), where)
                continue
            if i.opcode == "conditional":
                at.now += self._branches(i, times, path, where)
                continue
            if i.opcode.endswith("-update"):
                start = i.operands[0]
                if start in at.announced:
                    arrays = at.announced.pop(start)
                    at.started[i.name] = at.issue(*self._occupies(arrays)), arrays[0]
                elif start in at.started:
                    at.started[i.name] = at.started.pop(start)
                continue
            if i.opcode.endswith("-done"):
                started = at.started.pop(i.operands[0], None)
                if started:
                    self._wait(at, *started, times)
                continue
            if kind := kind_of(i, name):
                asynchronous = i.opcode.endswith("-start") or kind == "send"
                key = (*path, name, i.name)
                arrays = self._note(i, kind, times, key, where, asynchronous)
                end = at.issue(*self._occupies(arrays))
                if asynchronous:
                    at.started[i.name] = end, arrays[0]
                else:
                    self._wait(at, end, arrays[0], times)
                continue
            self._work(i, at, times, path, where)
        return at.now

    def _trips(self, computation: str, loop: Instruction) -> int:
        try:
            return hlo.trips(self.module, computation, loop)
        except ValueError:
            self.uncounted_loops += 1
            return 1

    def _work(
        self, i: Instruction, at: "_Clock", times: int, path: tuple[str, ...], scope: str
    ) -> None:
        """An instruction that computes, or one that runs a computation with collectives."""
        called = i.called if i.called in self.module.computations else None
        started, finished = [], []
        for inner, kind, computation in self._inside(called) if called else ():
            # The SparseCore's collectives are calls with a start and a done.
            apart = i.opcode.endswith("-start")
            chain = re.search(r'chain_id="(\d+)"', inner.rest)
            key = (*path, "chain", chain[1]) if chain else (*path, i.name, computation, inner.name)
            where = inner.scope or scope
            arrays = self._note(inner, kind, times, key, where, apart or bool(chain))
            if apart and not i.operands:  # they come with an update, and the transfer begins there
                at.announced[i.name] = arrays
            elif not chain:
                end = at.issue(*self._occupies(arrays))
                if apart:
                    at.started[i.name] = end, arrays[0]
                else:
                    self._wait(at, end, arrays[0], times)
            elif self._has_marker(called, "AsyncCollectiveStart"):
                started.append((chain[1], arrays))
            elif self._has_marker(called, "AsyncCollectiveDone"):
                finished.append(chain[1])
        for chain_id, arrays in started:
            at.started[chain_id] = at.issue(*self._occupies(arrays)), arrays[0]
        if (cycles := i.estimated_cycles) is None:
            self.unestimated += times
        else:
            self.cycles += cycles * times
            at.now += cycles / self.hertz
        for chain_id in finished:
            if chain_id in at.started:
                self._wait(at, *at.started.pop(chain_id), times)

    def _branches(self, i: Instruction, times: int, path: tuple[str, ...], scope: str) -> float:
        """All branches of a conditional count; the slowest one takes the time."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
        names = re.findall(r"%([\w.-]+)", listed[1]) if listed else []
        names += [n for n in map(i.attribute, ("true_computation", "false_computation")) if n]
        return max((self._computation(n, times, (*path, n), scope) for n in names), default=0.0)

    def _inside(self, computation: str) -> Iterator[tuple[Instruction, str, str]]:
        """The collectives in a computation that an instruction calls, and in those it calls."""
        for i in self.module.computations.get(computation, ()):
            if kind := kind_of(i, computation):
                yield i, kind, computation
            if i.called:
                yield from self._inside(i.called)

    def _has_marker(self, computation: str, marker: str) -> bool:
        return any(
            i.opcode == "custom-call" and marker in i.rest
            for i in self.module.computations[computation]
        )

    def _note(
        self,
        i: Instruction,
        kind: str,
        times: int,
        key: tuple,
        scope: str,
        asynchronous: bool,
    ) -> list[Collective]:
        """Adds a collective, unless a part of its chain was added; returns its arrays."""
        if key not in self._found:
            groups = groups_of(i)
            ways = len(members_of(groups) or ())
            self._found[key] = [
                Collective(kind, array, ways, groups, scope, times, asynchronous)
                for array in arrays_of(i, kind)
            ]
        return self._found[key]

    def _occupies(self, arrays: list[Collective]) -> tuple[float, tuple[str, ...]]:
        """The seconds that a collective of these arrays takes, and the links that it takes up."""
        links, what = self.links, arrays[0]
        if links is None:
            return 0.0, ()
        sent = sum(c.sent for c in arrays)
        match what.kind:
            case "send":
                return sent / links.network, ("network",)
            case "collective-permute":  # permutes along other links run at the same time
                return sent / links.one, (what.groups,)
        dimensions = links.along(members_of(what.groups))
        return sent / (2 * len(dimensions) * links.one), tuple(f"dimension {d}" for d in dimensions)

    def _wait(self, at: "_Clock", end: float, what: Collective, times: int) -> None:
        if end > at.now:
            self.exposed[what.kind, what.asynchronous] += (end - at.now) * times
            at.now = end


class _Clock:
    """The time in one run of a computation, and when its links are free."""

    def __init__(self) -> None:
        self.now = 0.0
        self.started: dict[str, tuple[float, Collective]] = {}
        self.announced: dict[str, list[Collective]] = {}
        self._free: collections.Counter[str] = collections.Counter()

    def issue(self, seconds: float, links: tuple[str, ...]) -> float:
        """Takes up links as soon as all of them are free; returns when that ends."""
        end = max([self.now, *(self._free[link] for link in links)]) + seconds
        self._free |= dict.fromkeys(links, end)
        return end
