"""Fewer steps on the command line than warm-up and decay need: both are shortened in proportion."""

import copy
import json

import pytest
from test_recipe import BASE

from jllama.config import recipe as recipes
from jllama.errors import UserError

WSD = {"kind": "wsd", "peak": 1e-3, "warmup_steps": 10, "decay_steps": 20, "floor": 0.1}


@pytest.fixture
def load(tmp_path):
    """A function of overrides over a recipe of 100 steps."""
    data = copy.deepcopy(BASE)
    data["training"]["schedule"] = WSD
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    return lambda *overrides: recipes.load(tmp_path / "recipe.yaml", overrides).training


@pytest.mark.parametrize(
    ("steps", "lengths"), [(29, (2, 5)), (1, (0, 1)), (30, (10, 20)), (500, (10, 20))]
)
def test_warm_up_and_decay_keep_their_part_of_the_run(load, steps, lengths, capfd):
    schedule = load(f"training.steps={steps}", "training.schedule.peak=0.002").schedule
    assert (schedule.warmup_steps, schedule.decay_steps) == lengths
    said = capfd.readouterr().err
    if steps == 29:
        assert said == (
            "note: training.steps=29 instead of 100 also shortens training.schedule:"
            " warmup_steps from 10 to 2, decay_steps from 20 to 5\n"
        )
    assert bool(said) == (steps < 30)


@pytest.mark.parametrize("key", ["warmup_steps=15", "decay_steps=15"])
def test_a_length_that_is_given_too_is_taken_at_its_word(load, key):
    with pytest.raises(UserError, match=r"warm-up and decay take \d+ steps, more than steps=24"):
        load("training.steps=24", f"training.schedule.{key}")


def test_a_recipe_that_has_too_few_steps_itself_is_an_error(load):
    with pytest.raises(UserError, match="take 120 steps, more than steps=100"):
        load("training.schedule.warmup_steps=100")
