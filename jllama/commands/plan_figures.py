"""What `jllama plan` prints of the compiled step, alone and beside another plan."""

from collections.abc import Callable
from typing import Any

from jllama.chips import GIB
from jllama.commands.table import table
from jllama.errors import UserError
from jllama.files import storage

Figures = dict[str, Any]
_WORD = {True: "overlapped", False: "waited for"}


def figures_of_step(figures: Figures) -> list[tuple[str, str]]:
    """Rows of a report's page: what the compiled step sends, and how long it would take."""
    program = figures["program"]
    rows = []
    if program:
        rows += [
            (f"sends by {_name(c)}", f"{c['sent_bytes'] / 1e9:.3g} GB in {c['arrays']:,} arrays")
            for c in program["collectives"]
            if c["sent_bytes"] >= 1e6
        ]
        if "estimated_seconds" in program:
            estimate = _seconds(program["estimated_seconds"])
            if program["unestimated"]:
                estimate += f", without {program['unestimated']:,} fusions that have none"
            rows.append(("compiler's estimate of its work", estimate))
            for share, seconds in program["modelled_seconds"].items():
                waits = sum(program["exposed_seconds"][share].values())
                text = f"{_seconds(seconds)}, of which it waits {_seconds(waits)}"
                rows.append((f"modelled step, links at {share}", text))
    options = [(f"XLA: {name}", str(value).lower()) for name, value in figures["xla"].items()]
    return rows + options


def comparison(first: str, second: str) -> str:
    """Two plans side by side, each a file that `--json` printed, with the ratio of the figures."""
    plans = [_read(first), _read(second)]
    rows = [("", first, second, "second / first")]
    for name, figure, show in _COMPARED:
        values = [figure(plan) for plan in plans]
        if any(value is not None for value in values):
            rows.append(_row(name, values, show))
    kinds = [{_name(c): c["sent_bytes"] for c in _collectives(plan)} for plan in plans]
    for kind in sorted(kinds[0].keys() | kinds[1].keys()):
        values = [of.get(kind, 0) for of in kinds]
        if max(values) >= 1e6:
            rows.append(_row(f"sends by {kind}", values, _gigabytes))
    return table(rows)


def _row(name: str, values: list[Any], show: Callable[[Any], str]) -> tuple[str, ...]:
    cells = ["-" if value is None else show(value) for value in values]
    compared = show in (_gib, _gigabytes, _seconds) and all(values)
    return (name, *cells, f"{values[1] / values[0]:.3f}" if compared else "")


def _read(path: str) -> Figures:
    figures = storage.read_json(storage.path(path))
    if "hbm_bytes_by_kind" not in figures:
        raise UserError(f"--compare: {path}: is no report that `jllama plan --json` printed")
    return figures


def _collectives(plan: Figures) -> list[Figures]:
    return (plan.get("program") or {}).get("collectives", [])


def _name(c: Figures) -> str:
    return f"{c['kind']}, {c['dtype']}, {_WORD[c['asynchronous']]}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.4g} s"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _of_program(*keys: str) -> Callable[[Figures], Any]:
    def figure(plan: Figures) -> Any:
        value = plan.get("program")
        for key in keys:
            value = None if value is None else value.get(key)
        return value

    return figure


def _exposed(share: str) -> Callable[[Figures], Any]:
    def figure(plan: Figures) -> float | None:
        waits = _of_program("exposed_seconds", share)(plan)
        return None if waits is None else sum(waits.values())

    return figure


def _unestimated(plan: Figures) -> int | None:
    return _of_program("unestimated")(plan) or None  # a row only where there are some


_COMPARED: tuple[tuple[str, Callable[[Figures], Any], Callable[[Any], str]], ...] = (
    ("recipe", lambda plan: plan["recipe"], str),
    ("devices", lambda plan: plan["devices"], str),
    ("topology", lambda plan: plan["topology"], str),
    ("tokens per step", lambda plan: plan["tokens_per_step"], "{:,}".format),
    ("fits", lambda plan: plan["fits"], lambda fits: "yes" if fits else "no"),
    ("memory per device", lambda plan: plan["hbm_bytes_per_device"], _gib),
    ("step at least", lambda plan: max(plan["step_seconds_at_least"].values()), _seconds),
    ("compiler's estimate of its work", _of_program("estimated_seconds"), _seconds),
    ("fusions that have no estimate", _unestimated, "{:,}".format),
    ("modelled step, links at 100%", _of_program("modelled_seconds", "100%"), _seconds),
    ("of which it waits", _exposed("100%"), _seconds),
    ("modelled step, links at 50%", _of_program("modelled_seconds", "50%"), _seconds),
    ("of which it waits", _exposed("50%"), _seconds),
)
