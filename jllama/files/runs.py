"""Where a run's folder has its recipe and its steps: RUN/config.yaml, RUN/checkpoints/STEP."""

from pathlib import Path

from jllama.files import storage

RECIPE = "config.yaml"
CHECKPOINTS = "checkpoints"


def run_and_step(path: Path) -> tuple[Path, int] | None:
    """RUN and STEP of a path that, once absolute, reads RUN/checkpoints/STEP; None of others."""
    folder = storage.absolute(path)
    is_step = folder.name.isdecimal() and folder.parent.name == CHECKPOINTS
    return (folder.parent.parent, int(folder.name)) if is_step else None
