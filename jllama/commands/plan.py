"""`jllama plan`: whether a recipe's run fits absent devices, and what bounds its speed."""

import argparse
import functools
import json
import math
from typing import Any

from jllama.chips import GIB
from jllama.commands.plan_figures import comparison, figures_of_step
from jllama.commands.table import table
from jllama.config import Config, MeshConfig
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.parallel.mesh import abstract_mesh
from jllama.parallel.sharding import Placement
from jllama.plan.process import CompileFailed, compile_step, environment
from jllama.plan.search import Change, Tried, search
from jllama.plan.step import Foreseen, foresee, state_bytes
from jllama.plan.topology import parse
from jllama.progress import say, waiting
from jllama.store.model import architecture_at

NOT_FITTING, FAILED = 1, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="the recipe; keys follow as for train.py")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("PLAN", "PLAN"),
        help="instead: two files that --json printed, side by side",
    )
    parser.add_argument(
        "--topology",
        help="chips of one slice: v5p:8x8x8, v5e:4x4, ..., or the cloud's name: v5p-1024,"
        " v5litepod-16, ...; or gpu:h100:8",
    )
    parser.add_argument(
        "--slices", type=int, default=1, help="slices joined by the data-centre network [1]"
    )
    parser.add_argument(
        "--tries",
        type=int,
        default=12,
        help="compilations at most to find changes that fit, if it does not fit [12]",
    )
    parser.add_argument(
        "--enough",
        type=int,
        default=2,
        help="kinds of change with one that fits, after which no other kind is tried [2]",
    )
    parser.add_argument("--json", action="store_true", help="print exact figures as JSON")
    parser.set_defaults(overrides=[])  # further arguments are keys of the recipe


def run(args: argparse.Namespace) -> int:
    """Returns 0 if the run fits, 1 if it does not, 3 if the compiler failed."""
    if args.compare:
        others = [f"--{n}" for n in ("config", "topology") if getattr(args, n)] + args.overrides
        if others:
            raise UserError(f"--compare reads two files and nothing else; leave out {others[0]}")
        print(comparison(*args.compare))
        return 0
    for name in ("config", "topology"):
        if not getattr(args, name):
            raise UserError(f"--{name}: is required, unless --compare is given")
    if args.tries < 0:
        raise UserError(f"--tries={args.tries}: must be at least 0")
    if args.enough < 1:
        raise UserError(f"--enough={args.enough}: must be at least 1")
    topology = parse(args.topology, args.slices)
    words = ["--config", args.config, *args.overrides]

    def changed(change: Change) -> Config:
        return recipes.from_arguments([*words, *(f"--{c}" for c in change)], architecture_at)

    @functools.cache
    def foreseen(change: Change = ()) -> Foreseen:
        config = changed(change)
        mesh = abstract_mesh(config.mesh, topology.devices, topology.slices)
        return foresee(config, Placement(mesh, config.sharding), topology)

    def attempt(change: Change = ()) -> dict[str, Any]:
        what = f"compiling for {topology.name}: {' '.join(change) or 'as given'}"
        say(what)
        with waiting(what):
            return compile_step(changed(change), topology, args.config)

    config = changed(())
    # Errors of the placement, and a missing compiler, come before anything is compiled.
    alone = foreseen().state_bytes
    environment(topology)
    try:
        report = attempt()
    except CompileFailed as error:
        say(f"error: the compiler failed: {error}")
        return FAILED
    tried = []
    if not report["fits"]:
        tried = search(config, report, attempt, foreseen, args.tries, args.enough)
    figures = {"recipe": args.config, "overrides": args.overrides} | report
    if not report["fits"]:
        figures["tried"] = [vars(t) | {"change": list(t.change)} for t in tried]
    too_large = alone >= report["hbm_capacity_bytes"]
    if too_large:
        single = Placement(abstract_mesh(MeshConfig(), 1), config.sharding)
        whole = state_bytes(config, single)
        figures["state_bytes"] = whole
        figures["state_devices_at_least"] = math.ceil(whole / report["hbm_capacity_bytes"])
    lowest = report["mesh"]["replica"] * report["mesh"]["fsdp"]  # a row per data-parallel group
    fewer_rows = lowest if lowest < config.eval.batch_size and not too_large else None
    print(json.dumps(figures, indent=2) if args.json else _page(figures, tried, fewer_rows))
    return 0 if report["fits"] else NOT_FITTING


def _page(figures: dict[str, Any], tried: list[Tried], fewer_rows: int | None) -> str:
    """The page; `fewer_rows` is the least eval.batch_size, or None if that does not help."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1)
    need, have = figures["hbm_bytes_per_device"], figures["hbm_capacity_bytes"]
    times = figures["step_seconds_at_least"]
    reading = figures.get("reading_bytes_per_device", 0)
    evaluation, host = figures["eval_hbm_bytes_per_device"], figures["host_bytes_per_device"]
    slices = f"{figures['slices']} x " if figures["slices"] > 1 else ""
    rows = [
        ("devices", f"{figures['devices']} ({slices}{figures['topology']})"),
        ("mesh", mesh or "one device"),
        ("rows per microbatch and replica", f"{figures['rows_per_device']:g}"),
        *((f"{kind} per device", _gib(n)) for kind, n in figures["hbm_bytes_by_kind"].items()),
        ("total per device", f"{_gib(need)} of {_gib(have)}"),
        ("evaluation per device", evaluation and _gib(evaluation)),
        ("host memory per device", host and _gib(host)),
        ("while the base is read", reading and _gib(reading)),
        ("fits", "yes" if figures["fits"] else "no"),
        ("model FLOPs per step", f"{figures['model_flops_per_step']:.4g}"),
        ("compile seconds", f"{figures['compile_seconds']:g}"),
        *((f"step at least, by {name}", f"{s:.4g} s") for name, s in times.items()),
        ("bound by", figures["bound_by"]),
        ("all steps at least", _duration(figures["run_seconds_at_least"])),
        *figures_of_step(figures),
    ]
    lines = [figures["recipe"], table([r for r in rows if r[1]], left=range(2), indent="  ")]
    if figures["fits"]:
        return "\n".join(lines)
    lines += [f"  {line}" for line in _verdicts(figures, fewer_rows)]
    return "\n".join(lines + _advice(tried))


def _verdicts(figures: dict[str, Any], fewer_rows: int | None) -> list[str]:
    """Whether the step and the evaluation fit, and the compiler's messages."""
    have, need = figures["hbm_capacity_bytes"], figures["hbm_bytes_per_device"]
    refused = figures.get("compiler_message")
    word = "does not fit" if refused or need > have else "fits"
    lines = [f"the step {word}: {_gib(need)} of {_gib(have)}"]
    if refused:
        lines.append(f"the compiler's message for the step: {refused}")
    if figures["eval_fits"] is not None:
        word, hint = "fits", ""
        if not figures["eval_fits"]:
            word = "does not fit"
            hint = f"; lower eval.batch_size, down to {fewer_rows}" if fewer_rows else ""
        need = figures["eval_hbm_bytes_per_device"]
        lines.append(f"the evaluation {word}: {_gib(need)} of {_gib(have)}{hint}")
    reading = figures.get("reading_bytes_per_device", 0)
    if reading > have:
        lines.append(f"the base does not fit while it is read and quantised: {_gib(reading)}")
    if refused := figures.get("eval_compiler_message"):
        optimizer = _gib(figures["hbm_bytes_by_kind"]["optimizer"])
        lines.append(
            "the compiler's message for the evaluation, which does not count the optimizer's"
            f" {optimizer} that stay in memory: {refused}"
        )
    if "state_bytes" in figures:
        lines.append(
            f"parameters and optimizer alone are {_gib(figures['state_bytes'])}: sharded over all"
            f" devices of a slice they take {figures['state_devices_at_least']:,} of them at least"
        )
    return lines


def _advice(tried: list[Tried]) -> list[str]:
    if not tried:
        return ["nothing else was tried"]
    rows = [
        (
            t.kind,
            " ".join(f"--{c}" for c in t.change),
            "fits" if t.fits else "no",
            f"at least {t.step_seconds_at_least:.4g} s" if t.step_seconds_at_least else "",
            _outcome(t),
        )
        for t in tried
    ]
    head = "tried:" if any(t.fits for t in tried) else "tried, and none of it fits:"
    return [head, table(rows, left=range(5), indent="  ")]


def _outcome(t: Tried) -> str:
    step, evaluation = t.hbm_bytes_per_device or 0, t.eval_hbm_bytes_per_device or 0
    sizes = [_gib(step)] if step else []
    if evaluation > step or (evaluation and any(c.startswith("eval.") for c in t.change)):
        sizes.append(f"evaluation {_gib(evaluation)}")
    return ": ".join(x for x in (", ".join(sizes), t.failure) if x)


def _duration(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds >= 2 * 86400 else f"{seconds / 3600:.2g} hours"


def _gib(n: float) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB / 100 else f"{n / 2**20:.2f} MiB"
