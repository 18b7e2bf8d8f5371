"""Reading a recipe to train."""

from collections.abc import Sequence
from pathlib import Path

from jllama.config import Config
from jllama.config import recipe as recipes
from jllama.store.model import architecture_at


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads the recipe at a path, applies overrides, and validates the result.

    Overrides are dotted "key=value", such as "training.steps=100" or "model=runs/tiny": a model may
    be a folder of any format. Raises `UserError`, one line that names the key.
    """
    return recipes.load(path, overrides, architecture_at)
