"""What a resumed run may change, and the note of it in the run's folder.

RUN/changes.jsonl has a line for each start that changed something beside names and reports: the
step it resumed from, and the values before and after by their keys. The newest config.yaml
describes every step of the run: what may change is what the steps before would not have done
otherwise, but for the order of sums.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jllama.config import Config, HeldOutShare, LoraConfig, NoRopeScaling, TokenizerFile
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.files import storage
from jllama.progress import say
from jllama.store.find import RECIPE
from jllama.train.optimizer import learning_rate
from jllama.train.origin import has_note, origin

CHANGES = "changes.jsonl"
Changes = dict[str, tuple[Any, Any]]  # by dotted key: the value before, and now

# No number of a run depends on these keys, and a change of them leaves no note.
_REPORTS = (
    "run.folder", "run.name", "run.log_every", "run.profile", "run.stop_after",
    "run.compilation_cache", "checkpoint.", "data.prefetch", "data.prepare.folder",
    "data.prepare.cache", "data.prepare.workers", "data.prepare.max_skipped", "distributed.",
    "sample.",
    # They only decide whether a run is refused: where it is not, its numbers are the same.
    "data.objective.second_marker", "data.objective.no_marker",
)  # fmt: skip
# The order of sums, memory, and what is measured.
_ORDER = (
    "mesh.", "sharding.", "training.accumulate", "compute.remat", "compute.loss_block",
    "compute.scan_unroll", "compute.attention", "compute.xla.", "eval.",
)  # fmt: skip
_HELD_OUT = "data.held_out"
# What the text is read from: its digest is compared with that of data.json.
_SOURCE = re.compile(r"data\.train\.\d+\.source\.")
# What the learning rates of the steps are made from.
_RATES = ("training.steps", "training.schedule.")
# What the state is, or may be: no other state can be gone on from.
_STATE = (
    "model.", "compute.param_dtype", "adapt.", "tokenizer.", "training.optimizer.kind",
    _HELD_OUT,  # whose text the run may have trained on
)  # fmt: skip


def check_changes(folder: Path, config: Config, step: int) -> Changes:
    """Returns the changes since the run's last start that are to be noted.

    Raises `UserError`, naming the keys, where the `step` steps that were taken would have been
    others.
    """
    old = recipes.load(folder / RECIPE)
    before, after = flatten(recipes.to_dict(old)), flatten(recipes.to_dict(config))
    changed = {
        key: (before.get(key, "absent"), after.get(key, "absent"))
        for key in sorted(before.keys() | after.keys())
        if before.get(key, ...) != after.get(key, ...) and not key.startswith(_REPORTS)
    }
    refused = [key for key in changed if not _is_free(key, folder, old, config)]
    reason = ""
    rates = [key for key in changed if key.startswith(_RATES)]
    if rates and not np.array_equal(_rates(old, step), _rates(config, step)):
        refused += rates
        reason = f"; the learning rates of the first {step} steps depend on training.schedule"
    if refused:
        listed = "; ".join(
            f"{key}: {changed[key][0]} before, {changed[key][1]} now" for key in refused[:5]
        )
        more = f" (and {len(refused) - 5} more)" if len(refused) > 5 else ""
        branch = ""
        if step < config.training.steps and not any(key.startswith(_STATE) for key in refused):
            branch = f" (--training.resume_from={folder}@{step} goes on from this one's state)"
        raise UserError(
            f"{folder} holds a run of another config: {listed}{more}{reason};"
            f" choose another run.name{branch} or delete the folder"
        )
    if config.training.steps < step:
        raise UserError(
            f"training.steps={config.training.steps}: {folder} is at step {step}; choose another"
            " run.name, or at least as many steps"
        )
    return changed


def _is_free(key: str, folder: Path, old: Config, new: Config) -> bool:
    """Whether the key alone says that its change changes no step that was taken."""
    shares = (isinstance(x.data.held_out, HeldOutShare) for x in (old, new))
    if key.startswith(_HELD_OUT) and any(shares):
        return False  # what one share holds out, another trains on
    if key.startswith((*_ORDER, _HELD_OUT)) or key.startswith(_RATES) or _SOURCE.match(key):
        return True
    if key == "model.max_length" and all(
        isinstance(x.model.rope, NoRopeScaling) for x in (old, new)
    ):
        return True  # no number depends on it
    if key.startswith("tokenizer.") and isinstance(new.tokenizer, TokenizerFile):
        return True  # is compared with the one in the folder
    # An overlay's base is compared by `note_base`, and is not read for anything else.
    if isinstance(new.adapt, LoraConfig) and key in ("training.init_from", "adapt.base"):
        return True
    (old_key, old_place), (new_key, new_place) = origin(old), origin(new)
    if key == "training.init_from" and old_key == new_key != key:
        return True  # is not read
    # The parameters at another place are compared by `check_origin`.
    return key == old_key == new_key and bool(old_place and new_place) and has_note(folder)


def _rates(config: Config, steps: int) -> np.ndarray:
    rate = learning_rate(config.training.schedule, config.training.steps)
    return np.broadcast_to(rate(np.arange(steps)), steps)


def note_changes(folder: Path, step: int, changes: Changes) -> None:
    """Adds the changes to RUN/changes.jsonl, and says them on stderr.

    Lines of later steps, which a lost checkpoint took back, count from `step` on.
    """
    lines = []
    if storage.exists(folder / CHANGES):
        lines = [json.loads(x) for x in storage.read_text(folder / CHANGES).splitlines()]
    for line in lines:
        line["step"] = min(line["step"], step)
    if changes:
        lines.append({"step": step, "changes": changes})
        listed = "; ".join(f"{key}: {a} before, {b} now" for key, (a, b) in changes.items())
        say(f"note: from step {step} on: {listed} ({folder / CHANGES})")
    if lines:
        storage.write_text(folder / CHANGES, "".join(json.dumps(x) + "\n" for x in lines))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested values as {dotted key: value}."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(x, dict) for x in tree):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {
        k: v for key, value in items
        for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }  # fmt: skip
