"""A schedule that fits into fewer steps: `--training.steps=20` is the recipe in short."""

from collections.abc import Sequence
from typing import Any

from jllama.progress import say

_LENGTHS = ("warmup_steps", "decay_steps")
# An override of one of these says itself how long warm-up and decay are.
_OWN = {"training", "training.schedule", *(f"training.schedule.{key}" for key in _LENGTHS)}


def shorten_schedule(data: dict, steps_before: Any, overrides: Sequence[str]) -> None:
    """Shortens warm-up and decay in proportion, and says so, if `training.steps` has no room.

    It changes the plain values of a recipe, in place, after `overrides` and before validation; what
    is not valid it leaves to that.

    Args:
      steps_before: `training.steps` without the overrides.
    """
    keys = {item.partition("=")[0] for item in overrides}
    if "training.steps" not in keys or keys & _OWN:
        return
    steps, schedule = data["training"]["steps"], data["training"].get("schedule")
    if not isinstance(schedule, dict):
        return
    lengths = {key: schedule[key] for key in _LENGTHS if key in schedule}
    if any(type(n) is not int for n in (steps, steps_before, *lengths.values())):
        return
    if not 0 < steps < sum(lengths.values()) <= steps_before:
        return
    shorter = {key: n * steps // steps_before for key, n in lengths.items()}
    if "decay_steps" in shorter:
        shorter["decay_steps"] = max(1, shorter["decay_steps"])
    schedule |= shorter
    listed = ", ".join(f"{key} from {lengths[key]} to {n}" for key, n in shorter.items())
    say(
        f"note: training.steps={steps} instead of {steps_before} also shortens training.schedule:"
        f" {listed}"
    )
