"""RUN/initial.json: the parameters that a run began with, where they were and their fingerprint.

They are those of `training.resume_from`, or of `training.init_from`. Where an overlay is trained,
base.json says it of the base.
"""

import json
from pathlib import Path
from typing import Any

from jllama.config import Config, LoraConfig
from jllama.errors import UserError
from jllama.files import storage
from jllama.parallel import distributed
from jllama.store.fingerprint import fingerprint

INITIAL = "initial.json"


def origin(config: Config) -> tuple[str, str]:
    """The key that names the parameters a run begins with, and its value; empty for fresh ones."""
    training = config.training
    if training.resume_from:
        return "training.resume_from", training.resume_from
    if isinstance(config.adapt, LoraConfig):
        return "training.init_from", ""
    return "training.init_from", training.init_from


def note_origin(folder: Path, config: Config, params: Any) -> None:
    """Writes down that the run in `folder` began with `params`, those of `origin(config)`.

    Every process calls it, and process 0 writes.
    """
    note = {"model": _absolute(config), "fingerprint": _digest(params)}
    text = json.dumps(note, indent=1) + "\n"
    leader = distributed.leader()
    distributed.together(lambda: storage.write_text(folder / INITIAL, text) if leader else None)


def has_note(folder: Path) -> bool:
    """Whether the folder says what its run began with."""
    return storage.exists(folder / INITIAL)


def is_elsewhere(folder: Path, config: Config) -> bool:
    """Whether the run in `folder` began with parameters at another path than `origin(config)`."""
    if not origin(config)[1] or not has_note(folder):
        return False
    return _read(folder)["model"] != _absolute(config)


def check_origin(folder: Path, config: Config, params: Any) -> None:
    """Raises UserError unless `params`, those of `origin(config)`, are what the run began with.

    Every process calls it.
    """
    (key, where), note = origin(config), _read(folder)
    if note["fingerprint"] != _digest(params):
        raise distributed.SharedError(
            f"{key}={where}: its parameters are not those that the run in {folder}"
            f" began with ({note['model']}); name that again, or choose another run.name"
        )


def _absolute(config: Config) -> str:
    return str(storage.absolute(storage.path(origin(config)[1])))


def _digest(params: Any) -> str:
    return fingerprint(params, "bfloat16")  # whichever dtype they are read in


def _read(folder: Path) -> dict[str, str]:
    try:
        note = json.loads(storage.read_text(folder / INITIAL))
        return {"model": note["model"], "fingerprint": note["fingerprint"]}
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(
            f"{folder / INITIAL}: not readable, what the run began with is unknown: {e!r}"
        ) from None
