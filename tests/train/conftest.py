"""A recipe on disk, and runs on one device."""

import jax
import pytest
import recipes

from jllama.train import run
from jllama.train.placement import make_placement


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The path of a recipe and its text; the first run prepares the text beside it."""
    return recipes.on_disk(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def one_device():
    """Runs use one device, whose peak is made up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_placement", lambda c: make_placement(c, jax.devices()[:1]))
        patch.setattr(run, "peak_flops", lambda dtype: (1e12, "published"))
        yield
