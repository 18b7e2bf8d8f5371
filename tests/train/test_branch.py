"""A run that goes on from another run's whole state: `training.resume_from`."""

import json
import re
import shutil

import numpy as np
import pytest

from jllama.config import recipe as configs
from jllama.errors import UserError
from jllama.store.find import complete_steps
from jllama.train import loop
from jllama.train.branch import open_branch
from jllama.train.metrics import read

pytestmark = pytest.mark.usefixtures("one_device")
CONSTANT = "training.schedule={kind: constant, peak: 0.01, warmup_steps: 2}"
WSD = "training.schedule={kind: wsd, peak: 0.01, warmup_steps: 2, decay_steps: 3, floor: 0}"
LORA = "adapt={kind: lora, rank: 2, alpha: 4}"


@pytest.fixture(scope="module")
def load(text, tmp_path_factory):
    """A function of overrides that gives a recipe of six steps; all runs lie in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    always = [f"run.folder={folder}", "training.steps=6", "eval.every=0", "checkpoint.every=3"]
    return lambda *overrides: configs.load(text, [*always, CONSTANT, *overrides])


@pytest.fixture(scope="module")
def whole(load, one_device):
    """The folder of a run of six steps with its checkpoint of step 3."""
    return loop.train(load("run.name=whole")).folder


def lines(folder):
    return [x for x in read(folder / "metrics.jsonl") if "loss" in x]


def losses(folder):
    return [(x["step"], x["loss"], x["grad_norm"], x["learning_rate"]) for x in lines(folder)]


@pytest.mark.optimized
def test_a_branch_with_the_same_recipe_is_the_run_bit_for_bit(load, whole, capfd):
    again = ("run.name=same", f"training.resume_from={whole}@3")
    folder = loop.train(load(*again, "run.stop_after=5")).folder
    assert f"resumed from {whole}@3 at step 3 of 6" in capfd.readouterr().err
    assert json.loads((folder / "initial.json").read_text())["model"] == f"{whole}@3"
    # From its own checkpoint on it is a run like any other.
    assert loop.train(load(*again)).done
    assert "resumed at step 5 of 6" in capfd.readouterr().err
    assert losses(folder) == losses(whole)[3:]
    assert complete_steps(folder / "checkpoints") == [5, 6]


def test_a_branch_with_another_schedule_takes_its_rates_from_the_step_on(load, whole, capfd):
    branch = (f"training.resume_from={whole}@3", "run.name=decay", WSD)
    folder = loop.train(load(*branch)).folder
    assert "untrained" not in capfd.readouterr().err  # that run may know the positions
    rates = [line["learning_rate"] for line in lines(folder)]
    np.testing.assert_allclose(rates, [0.01 * 2 / 3, 0.01 / 3, 0], rtol=1e-6, atol=1e-9)
    assert lines(folder)[0]["loss"] == pytest.approx(lines(whole)[3]["loss"], rel=1e-6)


def test_a_branch_that_holds_out_what_the_run_may_have_seen_says_so(load, whole, capfd):
    open_branch(load(f"training.resume_from={whole}@3"))
    assert "held out" not in capfd.readouterr().err
    share = "data.held_out={from: train, one_in: 3}"
    open_branch(load(f"training.resume_from={whole}@3", share))
    assert "that run may have trained on what is held out here" in capfd.readouterr().err


def test_a_branch_over_other_text_keeps_the_tokenizer(load, whole, text, tmp_path):
    other = text.read_text().replace("train.txt", "held_out.txt")
    (tmp_path / "recipe.yaml").write_text(other)
    keys = [
        f"run.folder={tmp_path}", "eval.every=0", CONSTANT, f"training.resume_from={whole}@3",
        "run.stop_after=4",
    ]  # fmt: skip
    folder = loop.train(configs.load(tmp_path / "recipe.yaml", keys)).folder
    pieces = [(x / "tokenizer.model").read_bytes() for x in (folder, whole)]
    assert pieces[0] == pieces[1]
    assert lines(folder)[0]["loss"] != lines(whole)[3]["loss"]


def test_the_run_may_move_once_its_branch_has_begun(load, whole, tmp_path):
    name = ("run.name=moved", "run.stop_after=4")
    folder = loop.train(load(*name, f"training.resume_from={whole}@3")).folder
    shutil.copytree(whole, tmp_path / "whole")
    loop.train(load(*name, f"training.resume_from={tmp_path / 'whole'}@3"))
    assert "training.resume_from" in (folder / "changes.jsonl").read_text()
    said = (
        r"^training\.resume_from=.*@6: its parameters are not those that the run in .*moved began"
    )
    with pytest.raises(UserError, match=said):
        loop.train(load(*name, f"training.resume_from={whole}@6", "training.steps=9"))


@pytest.mark.optimized
def test_a_branch_of_an_overlay_has_its_base(load, whole):
    lora = (LORA, f"training.init_from={whole}")
    first = loop.train(load("run.name=overlay", *lora)).folder
    branch = (f"training.resume_from={first}@3", "run.name=overlay-branch")
    assert losses(loop.train(load(*branch, *lora)).folder) == losses(first)[3:]
    other = f"training.init_from={whole / 'checkpoints' / '3'}"
    with pytest.raises(UserError, match="its overlay is over other parameters") as error:
        loop.train(load(*branch, LORA, other, "run.name=other-base"))
    named = re.search(r"over other parameters \((\S+)\) .*; name that", str(error.value))[1]
    way = (f"training.init_from={named}", "run.name=other-base", "run.stop_after=4")
    assert loop.train(load(*branch, LORA, *way)).steps == 4


def test_the_way_that_a_refusal_names_can_be_gone(load, whole):
    other = ("training.schedule.peak=0.02", "training.steps=8")
    with pytest.raises(UserError, match=r"the learning rates of the first 6 steps") as error:
        loop.train(load("run.name=whole", *other))
    way = re.search(r"--(training\.resume_from=\S+) goes on", str(error.value))[1]
    folder = loop.train(load("run.name=way", way, *other)).folder
    assert [line["step"] for line in lines(folder)] == [7, 8]


MUON = (
    "training.optimizer={kind: muon, momentum: 0.9, beta1: 0.9, beta2: 0.9, eps: 1e-8,"
    " weight_decay: 0, clip_norm: null}"
)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["training.resume_from=WHOLE@4"], "no such checkpoint; the run has: 3, 6"),
        (["training.resume_from=WHOLEx@3"], "no such run"),
        (["training.resume_from=WHOLE@6"], "the run would be complete; raise training.steps=6"),
        (["model.ffn_dim=96"], "model.ffn_dim is 96, there 80"),
        ([MUON], "training.optimizer.kind is muon, there adamw"),
        (["compute.param_dtype=bfloat16"], "compute.param_dtype is bfloat16, there float32"),
        ([LORA, "training.init_from=WHOLE"], "adapt.kind is lora, there none"),
    ],
    ids=str,
)
def test_a_state_that_is_not_the_recipes_is_refused_in_a_line(load, whole, keys, said):
    keys = [key.replace("WHOLE", str(whole)) for key in keys]
    with pytest.raises(UserError) as error:
        loop.train(load("run.name=refused", f"training.resume_from={whole}@3", *keys))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (whole.parent / "refused" / "config.yaml").exists()


def test_a_branch_of_a_runs_last_step_has_more_steps(load, whole):
    branch = f"training.resume_from={whole}@6"
    with pytest.raises(UserError, match=r"raise training\.steps=6, which counts from that run's"):
        open_branch(load(branch))
    assert open_branch(load(branch, "training.steps=7")).step == 6
