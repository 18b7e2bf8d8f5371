"""What would make a step fit that does not: remat, batch per device, mesh, offload, each tried.

A change is what a user would add to the command line. The changes of one kind go from mild to
strong; when the strongest fits, halving finds the mildest that does.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jllama.config import Config
from jllama.errors import UserError
from jllama.plan.process import CompileFailed

_REMAT = ("none", "dots", "attention", "full")  # from the fastest to the smallest

_ALONE = "parameters and optimizer alone, not compiled"

Change = tuple[str, ...]  # overrides, key=value
Try = Callable[[Change], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Tried:
    """One change and what came of it: bytes, or the line that says why it cannot be.

    What is too large by parameters and optimizer alone has their bytes, and a line that says so.
    """

    kind: str
    change: Change
    fits: bool
    hbm_bytes_per_device: int | None
    failure: str | None = None
    eval_hbm_bytes_per_device: int | None = None


def search(
    config: Config, report: dict[str, Any], attempt: Try, state: Callable[[Change], int], limit: int
) -> list[Tried]:
    """Tries changes until each kind has its answer or `limit` compilations are done.

    `attempt` gives the report of the recipe with overrides; `report` is that without any. `state`
    gives the bytes of parameters and optimizer alone: what they are too many for is not compiled.
    """
    tried: dict[Change, Tried] = {}
    capacity = report["hbm_capacity_bytes"]
    compiled = 0

    # Fewer rows at a time change neither the step nor what the evaluation says: tried first, and
    # with all else.
    lower = _evaluation(config, report)

    def one(kind: str, change: Change) -> bool | None:
        if kind not in ("mesh", "eval"):
            change = (*change, *lower)
        if change in tried:
            return tried[change].fits
        nonlocal compiled
        if compiled >= limit:
            return None
        try:
            alone = state(change)
            if alone >= capacity:
                tried[change] = Tried(kind, change, False, alone, _ALONE)
            else:
                compiled += 1
                tried[change] = _tried(kind, change, attempt(change))
        except (UserError, CompileFailed) as error:
            tried[change] = Tried(kind, change, False, None, str(error))
        return tried[change].fits

    known = report["hbm_bytes_by_kind"]
    alone = known["parameters"] + known["optimizer"]
    if lower and alone < capacity and one("eval", lower) in (True, None):
        return list(tried.values())
    step_fits = "compiler_message" not in report and report["hbm_bytes_per_device"] <= capacity
    kinds = {"mesh": _meshes(config, report)}
    # Nothing helps that leaves the state as it is when that is too large, nor the evaluation what
    # the step alone does.
    if alone < capacity and not step_fits:
        kinds = {"remat": _remats(config), "batch": _batches(config, report)} | kinds
        kinds["offload"] = [("compute.remat=offload",)] if config.compute.remat != "offload" else []
    for kind, changes in kinds.items():
        if kind == "mesh":
            _first(kind, changes, one)
        else:
            _mildest(kind, changes, one)
    if not any(t.fits for t in tried.values()):
        for change in _together(kinds):
            if one("together", change):
                break
    return list(tried.values())


def _tried(kind: str, change: Change, report: dict[str, Any]) -> Tried:
    return Tried(
        kind,
        change,
        report["fits"],
        report["hbm_bytes_per_device"],
        eval_hbm_bytes_per_device=report["eval_hbm_bytes_per_device"],
    )


def _mildest(kind: str, changes: Sequence[Change], one: Callable[..., bool | None]) -> None:
    if not changes or not one(kind, changes[-1]):
        return
    low, high = 0, len(changes) - 1  # changes[high] fits
    while low < high:
        middle = (low + high) // 2
        fits = one(kind, changes[middle])
        if fits is None:
            return
        low, high = (low, middle) if fits else (middle + 1, high)


def _first(kind: str, changes: Sequence[Change], one: Callable[..., bool | None]) -> None:
    for change in changes:
        if one(kind, change) in (True, None):
            return


def _evaluation(config: Config, report: dict[str, Any]) -> Change:
    """A row of the evaluation per group of devices that share rows, if it is what does not fit."""
    ways = report["mesh"]["replica"] * report["mesh"]["fsdp"]
    if report["eval_fits"] is not False or ways >= config.eval.batch_size:
        return ()
    return (f"eval.batch_size={ways}",)


def _remats(config: Config) -> list[Change]:
    if config.compute.remat not in _REMAT:
        return []
    return [(f"compute.remat={r}",) for r in _REMAT[_REMAT.index(config.compute.remat) + 1 :]]


def _batches(config: Config, report: dict[str, Any]) -> list[Change]:
    """More microbatches of the same step, down to a row per group of devices that share rows."""
    training, mesh = config.training, report["mesh"]
    ways = mesh["replica"] * mesh["fsdp"]
    most = training.batch_size // ways
    return [
        (f"training.accumulate={n}",)
        for n in range(training.accumulate + 1, most + 1)
        if most % n == 0
    ]


def _meshes(config: Config, report: dict[str, Any]) -> list[Change]:
    """Other factors of the same devices; the batch stays, and slices stay `replica`.

    Each shares rows out over a divisor of the ways before, so that the evaluation's still do; when
    they are too many they become the fewest.
    """
    mesh, slices, heads = report["mesh"], report["slices"], config.model.num_heads
    replica, tensor, context = mesh["replica"], mesh["tensor"], mesh["context"]
    found = [(slices, tensor, context)] if replica > slices else []
    found += [(replica, tensor * n, context) for n in (2, 4, 8) if heads % (tensor * n) == 0]
    found += [(replica, tensor, context * n) for n in (2, 4)]
    changes = []
    for replica, tensor, context in found:
        fsdp, rest = divmod(report["devices"], replica * tensor * context)
        if rest or not fsdp or config.training.batch_size % (replica * fsdp):
            continue
        sizes = {"replica": replica, "fsdp": fsdp, "tensor": tensor, "context": context}
        change = tuple(f"mesh.{axis}={n}" for axis, n in sizes.items() if n != mesh[axis])
        changes.append((*change, *_evaluation(config, report | {"mesh": sizes})))
    return changes


def _together(kinds: dict[str, list[Change]]) -> Iterator[Change]:
    """The strongest of remat and batch, then with offload, then with parameters in bfloat16."""
    change: Change = sum((kinds[k][-1] for k in ("remat", "batch") if kinds.get(k)), ())
    if change:
        yield change
    if kinds.get("offload"):
        change = (*(c for c in change if not c.startswith("compute.remat=")), *kinds["offload"][0])
        yield change
    yield (*change, "compute.param_dtype=bfloat16")
