"""A run with the infilling objective resumes bit for bit, and reports how many rows it cut."""

import functools
import re

import jax
import pytest
import recipes

from jllama.config import recipe as configs
from jllama.errors import UserError
from jllama.store.fingerprint import fingerprint
from jllama.train import loop, run
from jllama.train.folder import run_folder
from jllama.train.placement import make_placement
from jllama.train.state import define_state, load_state

STEPS = 4
INFILL = [
    "data.objective.kind=infill", "tokenizer.infill=true", "data.length=40", "data.held_out=[]",
    f"training.steps={STEPS}", "checkpoint.every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return recipes.on_disk(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    one = functools.partial(make_placement, devices=jax.devices()[:1])
    monkeypatch.setattr(run, "make_placement", one)
    monkeypatch.setattr(run, "peak_flops", lambda dtype: (1e12, "published"))


def digest(config):
    placement = make_placement(config, jax.devices()[:1])
    return fingerprint(load_state(run_folder(config), STEPS, define_state(config, placement)))


@pytest.mark.optimized
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(text, tmp_path, capfd):
    def recipe(*more):
        return configs.load(text, [*INFILL, f"run.folder={tmp_path}", *more])

    loop.train(recipe("run.name=whole"))
    said = capfd.readouterr().err
    line = r"infilling, cut in three: ([\d,]+) of ([\d,]+) documents in ([\d,]+) rows; \d+ of"
    cut, documents, rows = (int(n.replace(",", "")) for n in re.search(line, said).groups())
    assert 8 * STEPS <= rows <= 8 * (STEPS + 5) and 0 < cut < documents  # some rows were read ahead
    loop.train(recipe("run.name=parts", "run.stop_after=2"))
    loop.train(recipe("run.name=parts"))
    assert digest(recipe("run.name=parts")) == digest(recipe("run.name=whole"))
    with pytest.raises(UserError, match=r"data\.objective\.kind: infill before, causal now"):
        loop.train(recipe("run.name=whole", "data.objective.kind=causal"))


def test_a_tokenizer_without_infilling_tokens_is_a_one_line_error(text, tmp_path):
    with pytest.raises(UserError, match=r"no ▁<PRE>.*tokenizer\.infill=true"):
        loop.train(
            configs.load(text, [*INFILL, "tokenizer.infill=false", f"run.folder={tmp_path}"])
        )
