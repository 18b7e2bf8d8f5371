"""jllama.train as a library: a loop of one's own does bit for bit what `train` does."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes

import jllama
import jllama.train as jt
from jllama.store.fingerprint import fingerprint

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "own_loop.py"
PAGE = (ROOT / "docs" / "library.md").read_text()
STEPS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipes.on_disk(tmp_path_factory.mktemp("text"), num_layers=1)


def overrides(name):
    return [f"training.steps={STEPS}", f"run.name={name}"]


@pytest.fixture(scope="module")
def trained(recipe):
    """What `train` reports of the recipe."""
    return jt.train(jt.load_recipe(recipe, overrides("trained")))


@pytest.fixture
def example():
    """The function `main` of the example."""
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def state_of(recipe, name):
    config = jt.load_recipe(recipe, overrides(name))
    definition = jt.define_state(config, jt.make_placement(config))
    return jt.load_state(recipe.parent / "runs" / name, STEPS, definition)


def evaluated(out):
    """The values that the example printed last."""
    return ast.literal_eval(out.splitlines()[-1])


@pytest.mark.optimized
def test_with_the_unchanged_loss_the_example_is_train_bit_for_bit(recipe, trained, example, capsys):
    example("plain", recipe, *overrides("plain"))
    out = capsys.readouterr().out
    assert fingerprint(state_of(recipe, "plain")) == fingerprint(state_of(recipe, "trained"))
    lines = [x for x in jllama.train.metrics.read(trained.folder / "metrics.jsonl") if "loss" in x]
    said = [f"step {line['step']}  loss {line['loss']:.4f}" for line in lines]
    assert len(said) == STEPS
    assert out.splitlines()[:-1] == said
    assert evaluated(out) == trained.eval


def test_with_another_loss_it_trains_another_model_and_load_opens_it(
    recipe, trained, example, capsys
):
    example("smooth", recipe, *overrides("smooth"))
    values = evaluated(capsys.readouterr().out)
    assert fingerprint(state_of(recipe, "smooth")) != fingerprint(state_of(recipe, "trained"))
    # The held-out loss is the likelihood's, whatever is trained on: close, and not the same.
    assert values["loss"] == pytest.approx(trained.eval["loss"], rel=0.05)
    assert values["loss"] != trained.eval["loss"]
    model = jllama.load(recipe.parent / "runs" / "smooth")
    assert np.isfinite(model.logits(np.array([[1, 5, 7]]))).all()
    weights = jax.tree.map(np.asarray, state_of(recipe, "smooth").trainable)
    jax.tree.map(np.testing.assert_array_equal, model.params, weights)


def test_logits_give_the_loss_that_the_recipe_has(recipe):
    config = recipes.in_memory("compute.attention={kind: reference}")
    placement = jt.make_placement(config)
    state = jt.init_state(jt.define_state(config, placement), 0)
    batch = placement.put_batch(recipes.batch(config))
    with placement.active():
        logits, targets, weights = jt.causal_lm_logits(config, state.trainable, (), batch, None)
        wanted, weight, _ = jt.causal_lm_loss(config, state.trainable, (), batch, None)
    B, T, V = config.training.batch_size, config.data.length, config.model.vocab_size
    assert (logits.shape, logits.dtype) == ((B, T, V), "float32")
    assert (targets.shape, targets.dtype) == ((B, T), "int32")
    assert (weights.shape, weights.dtype) == ((B, T), "float32")
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)
    assert float(wanted) == pytest.approx(-float((log_p[..., 0] * weights).sum()), rel=1e-5)
    assert float(weight) == pytest.approx(float(weights.sum()), rel=1e-6)


def test_batches_are_a_pure_function_of_the_step(recipe):
    config = jt.load_recipe(recipe, overrides("batches"))
    placement = jt.make_placement(config)
    with jt.open_run(config) as (_, data):
        batches = jt.Batches(config, data, placement)
        ahead = batches.iterate(2)
        for t in (2, 3):
            step, batch = next(ahead)
            assert step == t
            jax.tree.map(np.testing.assert_array_equal, batch, batches(t))
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
        "tokens": ((8, 25), "int32"),
        "segments": ((8, 25), "int32"),
        "weights": ((8, 25), "float32"),
    }
    assert len(batch["tokens"].sharding.device_set) == 8


def test_every_sum_of_a_loss_function_is_reported_as_a_mean():
    config = recipes.in_memory("training.accumulate=2", "training.batch_size=16")

    def loss(trainable, frozen, batch, key):
        total, weight, sums = jt.causal_lm_loss(config, trainable, frozen, batch, key)
        return total, weight, sums | {"twice": 2 * sums["nll_sum"]}

    placement = jt.make_placement(config)
    definition = jt.define_state(config, placement)
    step = jt.make_train_step(config, loss, definition, placement)
    batch = placement.put_batch(recipes.batch(config))
    _, metrics = step(jt.init_state(definition, 0), (), batch)
    assert float(metrics["twice"]) == pytest.approx(2 * float(metrics["loss"]), rel=1e-6)


def test_a_run_of_ones_own_goes_on_from_its_checkpoint(recipe, trained):
    config = jt.load_recipe(recipe, overrides("trained"))
    placement = jt.make_placement(config)
    definition = jt.define_state(config, placement)
    with jt.open_run(config) as (folder, _):
        state, frozen = jt.start_state(config, placement, definition, folder, STEPS)
    assert (int(state.step), frozen) == (STEPS, ())
    assert fingerprint(state) == fingerprint(state_of(recipe, "trained"))


def test_importing_the_package_does_not_import_jax():
    code = "import sys, jllama.train; print('jax' in sys.modules, 'optax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.split() == ["False", "False"], run.stderr


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_the_page_shows_the_example():
    assert EXAMPLE.read_text() in PAGE


@pytest.mark.parametrize("name", jt.__all__)
def test_a_public_name_has_a_docstring_and_is_described(name):
    assert len(inspect.getdoc(getattr(jt, name))) > 20
    assert re.search(rf"^\| `{name}\b", PAGE, re.MULTILINE), f"docs/library.md: no row for {name}"
