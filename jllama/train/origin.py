"""RUN/initial.json: the model whose parameters a run began with, and their fingerprint.

Where an overlay is trained, base.json says it of the base.
"""

import json
from pathlib import Path
from typing import Any

from jllama.errors import UserError
from jllama.files import storage
from jllama.parallel import distributed
from jllama.store.fingerprint import fingerprint

INITIAL = "initial.json"


def note_origin(folder: Path, where: str, params: Any) -> None:
    """Writes down that the run in `folder` began with `params`, read from `where`.

    Every process calls it, and process 0 writes.
    """
    note = {"model": _absolute(where), "fingerprint": _digest(params)}
    text = json.dumps(note, indent=1) + "\n"
    leader = distributed.leader()
    distributed.together(lambda: storage.write_text(folder / INITIAL, text) if leader else None)


def has_note(folder: Path) -> bool:
    """Whether the folder says what its run began with."""
    return storage.exists(folder / INITIAL)


def is_elsewhere(folder: Path, where: str) -> bool:
    """Whether the run in `folder` began with a model at another path than `where`."""
    if not where or not has_note(folder):
        return False
    return _read(folder)["model"] != _absolute(where)


def check_origin(folder: Path, where: str, params: Any) -> None:
    """Raises UserError unless `params`, read from `where`, are what the run began with.

    Every process calls it. A run that a note does not describe is not compared.
    """
    if not has_note(folder):
        return
    note = _read(folder)
    if note["fingerprint"] != _digest(params):
        raise distributed.SharedError(
            f"training.init_from={where}: its parameters are not those that the run in {folder}"
            f" began with ({note['model']}); name that again, or choose another run.name"
        )


def _absolute(where: str) -> str:
    return str(storage.absolute(storage.path(where)))


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
