"""What an error suggests for a key or a model that does not exist."""

import pytest

from jllama.config import Config, recipe, schema
from jllama.config.suggestions import _OTHER_NAMES, meant_names
from jllama.errors import UserError

TINY = recipe.configs_folder() / "train" / "tiny.yaml"


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        (
            "training.lr=1",
            r"training\.schedule\.peak \(learning rate after the warm-up\)\? ",
        ),
        ("lr=1", r"training\.schedule\.peak "),
        ("training.learningRate=1", r"training\.schedule\.peak "),
        ("training.epochs=1", r"training\.steps \(optimizer steps of the whole run\)\? "),
        ("batch_size=1", r"training\.batch_size \([^)]*\) or eval\.batch_size "),
        ("training.bs=1", r"training\.batch_size \([^)]*\)\? "),
        ("model.seq_len=1", r"model\.max_length \([^)]*\)\? "),
        ("optimizer.lr=1", r"training\.optimizer "),
        ("training.seed=1", r"run\.seed \(seed of every random number\)\? "),
        ("model.hidden_size=1", r"hidden_dim\? "),
    ],
)
def test_a_key_by_another_name_or_in_another_place(override, wanted):
    with pytest.raises(UserError, match=f": unknown key; did you mean {wanted}"):
        recipe.load(TINY, [override])


def test_a_key_of_another_kind_is_not_suggested_for_itself():
    with pytest.raises(UserError, match=r"model\.rope\.factor: unknown key; allowed: kind$"):
        recipe.load(TINY, ["model.rope.factor=2"])


def test_every_name_that_may_be_suggested_is_a_key():
    keys = [f".{key}" for key, _, _ in schema.describe_keys(Config)]
    assert all(any(key.endswith(f".{name}") for key in keys) for name in _OTHER_NAMES)


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("llama-3-8b", "llama3-8b", 1),
        ("Llama_3.1_8B", "llama3.1-8b", 1),
        ("Meta-Llama-3-8B-Instruct", "llama3-8b", 1),
        ("Llama-2-7b-hf", "llama2-7b", 3),
        ("nothing", None, 0),
    ],
)
def test_near_names_of_models(name, first, count):
    names = meant_names(name, recipe.model_names())
    assert (next(iter(names), None), len(names)) == (first, count)


def test_a_model_of_the_hub_is_named_as_it_is_shipped():
    with pytest.raises(UserError, match=r"no such folder; .*did you mean llama3\.1-8b\? "):
        recipe.load_model("meta-llama/Llama-3.1-8B")
