"""Searches changes that make a step fit: of remat, batch per device, mesh, and offload.

A change is the options that a user would add to the command line. The changes of one kind are
ordered from mild to strong; if the strongest fits, bisection finds the mildest that fits. The kinds
and the meshes come in the order of promise: those first whose best change has the lowest bound of
the step's time.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jllama.config import Config
from jllama.errors import UserError
from jllama.plan.process import CompileFailed
from jllama.plan.step import Foreseen

_REMAT = ("none", "dots", "attention", "full")  # from the fastest to the smallest

_ALONE = "parameters and optimizer alone, not compiled"

Change = tuple[str, ...]  # overrides, key=value
Try = Callable[[Change], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Tried:
    """One change and its result: the bytes of a device, or a line that says why it failed.

    If parameters and optimizer alone are too large, it has their bytes, and a line that says so.
    `step_seconds_at_least` is the largest lower bound of the step's time; None if it cannot be.
    """

    kind: str
    change: Change
    fits: bool
    hbm_bytes_per_device: int | None
    failure: str | None = None
    eval_hbm_bytes_per_device: int | None = None
    step_seconds_at_least: float | None = None


def search(
    config: Config,
    report: dict[str, Any],
    attempt: Try,
    foresee: Callable[[Change], Foreseen],
    limit: int,
    enough: int,
) -> list[Tried]:
    """Tries changes until `enough` kinds have one that fits, or `limit` compilations are done.

    Args:
      report: the report of the recipe as it is.
      attempt: compiles the recipe with a change, and returns its report.
      foresee: what is known of a change without compiling it, which it is not if parameters and
        optimizer alone do not fit.
    """
    tried: dict[Change, Tried] = {}
    capacity = report["hbm_capacity_bytes"]
    compiled = 0

    # Evaluating fewer rows at a time changes neither the step nor the evaluation's result, so it is
    # tried first, and then together with all other changes.
    lower = _evaluation(config, report)

    def try_change(kind: str, change: Change) -> bool | None:
        """Whether the change fits; None if no more compilations are allowed."""
        if kind not in ("mesh", "eval"):
            change = (*change, *lower)
        if change in tried:
            return tried[change].fits
        nonlocal compiled
        if compiled >= limit:
            return None
        seconds = None
        try:
            alone, seconds = foresee(change)
            if alone >= capacity:
                tried[change] = Tried(kind, change, False, alone, _ALONE, None, seconds)
            else:
                compiled += 1
                made = attempt(change)
                need, eval_need = made["hbm_bytes_per_device"], made["eval_hbm_bytes_per_device"]
                tried[change] = Tried(kind, change, made["fits"], need, None, eval_need, seconds)
        except (UserError, CompileFailed) as error:
            tried[change] = Tried(kind, change, False, None, str(error), None, seconds)
        return tried[change].fits

    def seconds_of(change: Change) -> float:
        try:
            return foresee(change).step_seconds
        except UserError:
            return math.inf

    known = report["hbm_bytes_by_kind"]
    alone = known["parameters"] + known["optimizer"]
    if lower and alone < capacity and try_change("eval", lower) in (True, None):
        return list(tried.values())
    step_fits = "compiler_message" not in report and report["hbm_bytes_per_device"] <= capacity
    kinds = {"mesh": _meshes(config, report)}
    # Remat, batch and offload do not make the state smaller, and help only the step.
    if alone < capacity and not step_fits:
        kinds = {"remat": _remats(config), "batch": _batches(config, report)} | kinds
        kinds["offload"] = [("compute.remat=offload",)] if config.compute.remat != "offload" else []
    kinds["mesh"].sort(key=seconds_of)
    promise = {kind: seconds_of(changes[0]) for kind, changes in kinds.items() if changes}
    for kind in sorted(promise, key=lambda kind: promise[kind]):
        if len({t.kind for t in tried.values() if t.fits}) >= enough:
            break
        changes = kinds[kind]
        if kind != "mesh":
            _mildest(kind, changes, try_change)
            continue
        for change in changes:
            if try_change(kind, change) is not False:  # it fits, or no more are allowed
                break
    if not any(t.fits for t in tried.values()):
        for change in _together(kinds):
            if try_change("together", change):
                break
    return list(tried.values())


def _mildest(kind: str, changes: Sequence[Change], try_change: Callable[..., bool | None]) -> None:
    """Tries the strongest change, and if it fits, bisects for the mildest that fits."""
    if not changes or not try_change(kind, changes[-1]):
        return
    low, high = 0, len(changes) - 1  # changes[high] fits
    while low < high:
        middle = (low + high) // 2
        fits = try_change(kind, changes[middle])
        if fits is None:
            return
        low, high = (low, middle) if fits else (middle + 1, high)


def _evaluation(config: Config, report: dict[str, Any]) -> Change:
    """The change to one row of the evaluation per data-parallel group; () if that does not help."""
    ways = report["mesh"]["replica"] * report["mesh"]["fsdp"]
    if report["eval_fits"] is not False or ways >= config.eval.batch_size:
        return ()
    return (f"eval.batch_size={ways}",)


def _remats(config: Config) -> list[Change]:
    if config.compute.remat not in _REMAT:
        return []
    return [(f"compute.remat={r}",) for r in _REMAT[_REMAT.index(config.compute.remat) + 1 :]]


def _batches(config: Config, report: dict[str, Any]) -> list[Change]:
    """Changes to more microbatches of the same step, down to one row per data-parallel group."""
    training, mesh = config.training, report["mesh"]
    ways = mesh["replica"] * mesh["fsdp"]
    most = training.batch_size // ways
    return [
        (f"training.accumulate={n}",)
        for n in range(training.accumulate + 1, most + 1)
        if most % n == 0
    ]


def _meshes(config: Config, report: dict[str, Any]) -> list[Change]:
    """Other meshes of the same devices; the batch stays, and `replica` still spans the slices.

    Each shards rows over a divisor of the former number of ways, so that the evaluation's rows
    still divide. If the evaluation does not fit, its rows become the fewest.
    """
    mesh, slices, heads = report["mesh"], report["slices"], config.model.num_heads
    replica, tensor, context = mesh["replica"], mesh["tensor"], mesh["context"]
    meshes = [(slices, tensor, context)] if replica > slices else []
    meshes += [(replica, tensor * n, context) for n in (2, 4, 8) if heads % (tensor * n) == 0]
    meshes += [(replica, tensor, context * n) for n in (2, 4)]
    changes = []
    for replica, tensor, context in meshes:
        fsdp, rest = divmod(report["devices"], replica * tensor * context)
        if rest or not fsdp or config.training.batch_size % (replica * fsdp):
            continue
        sizes = {"replica": replica, "fsdp": fsdp, "tensor": tensor, "context": context}
        change = tuple(f"mesh.{axis}={n}" for axis, n in sizes.items() if n != mesh[axis])
        changes.append((*change, *_evaluation(config, report | {"mesh": sizes})))
    return changes


def _together(kinds: dict[str, list[Change]]) -> Iterator[Change]:
    """The strongest remat and batch together, then offload too, then bfloat16 parameters too."""
    change: Change = sum((kinds[k][-1] for k in ("remat", "batch") if kinds.get(k)), ())
    if change:
        yield change
    if kinds.get("offload"):
        change = (*(c for c in change if not c.startswith("compute.remat=")), *kinds["offload"][0])
        yield change
    yield (*change, "compute.param_dtype=bfloat16")
