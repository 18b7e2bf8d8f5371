"""The figures of a report that are counted in the compiled step."""

import collections
from collections.abc import Sequence
from typing import Any

from jllama.plan.hlo import Module
from jllama.plan.program import collectives, modelled_step
from jllama.plan.topology import Topology

_SHARES = (1.0, 0.5)  # of the links' published bandwidth, for the modelled time


def seconds_to_send(program: Module, topology: Topology) -> dict[str, float]:
    """Seconds that a device takes at least for what the compiled step sends, by network."""
    sent: collections.Counter[str] = collections.Counter()
    for c in collectives(program):
        sent["network" if c.kind == "send" else "interconnect"] += c.times * c.sent
    chip = topology.chip
    rates = {"interconnect": chip.ici_bandwidth, "network": chip.dcn_bandwidth}
    return {name: size / rates[name] for name, size in sent.items() if size and rates[name]}


def counted(
    program: Module, topology: Topology, places: Sequence[Sequence[int]] | None
) -> dict[str, Any]:
    """What the compiled step does; docs/planning.md lists the keys.

    `places` are the coordinates of a TPU's devices in the program's order. The compiler for GPUs
    estimates no time.
    """
    sums: dict[tuple[str, str, bool], list[float]] = {}
    for c in collectives(program):
        total = sums.setdefault((c.kind, c.array.dtype, c.asynchronous), [0, 0, 0])
        for i, amount in enumerate((1, c.array.bytes, c.sent)):
            total[i] += c.times * amount
    figures: dict[str, Any] = {
        "collectives": [
            {
                "kind": kind,
                "dtype": dtype,
                "asynchronous": asynchronous,
                "arrays": arrays,
                "bytes": round(size),
                "sent_bytes": round(sent),
            }
            for (kind, dtype, asynchronous), (arrays, size, sent) in sorted(sums.items())
        ]
    }
    if topology.on_gpu:
        return figures
    chip = topology.chip
    steps = {f"{share:.0%}": modelled_step(program, chip, share, places) for share in _SHARES}
    cycles = steps["100%"].cycles
    return figures | {
        "uncounted_loops": steps["100%"].uncounted_loops,
        "estimated_cycles": cycles,
        "unestimated": steps["100%"].unestimated,
        "estimated_seconds": cycles * chip.flops_per_cycle / chip.flops,
        "modelled_seconds": {share: step.seconds for share, step in steps.items()},
        "exposed_seconds": {
            share: {
                f"{kind}, {'asynchronous' if overlaps else 'synchronous'}": seconds
                for (kind, overlaps), seconds in step.exposed.items()
            }
            for share, step in steps.items()
        },
    }
