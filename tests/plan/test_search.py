"""The search for what fits, over steps whose bytes are made up."""

import recipes

from jllama.config import Config
from jllama.config import recipe as recipe_loader
from jllama.plan.process import CompileFailed
from jllama.plan.search import search
from jllama.plan.step import Foreseen

CAPACITY = 100
MESH = {"replica": 1, "fsdp": 4, "context": 1, "tensor": 1}


def report(size, parameters=10, evaluation=None):
    eval_fits = None if evaluation is None else evaluation <= CAPACITY
    return {
        "fits": size <= CAPACITY and eval_fits is not False,
        "eval_hbm_bytes_per_device": evaluation,
        "eval_fits": eval_fits,
        "hbm_bytes_per_device": size,
        "hbm_capacity_bytes": CAPACITY,
        "hbm_bytes_by_kind": {"parameters": parameters, "optimizer": 2 * parameters},
        "mesh": MESH,
        "slices": 1,
        "devices": 4,
    }


def run(sizes, *overrides, limit=20, enough=9, parameters=10, states=(), seconds=()):
    """Searches from 500 bytes; `sizes` gives a change's bytes, 300 where it says nothing.

    `states` gives those of parameters and optimizer, where a change has others, and `seconds` the
    bounds of the step's time that are not 1.
    """
    asked = []

    def attempt(change):
        asked.append(change)
        size = sizes.get(change, 300)
        if isinstance(size, Exception):
            raise size
        return report(size)

    def foresee(change):
        return Foreseen(dict(states).get(change, 3 * parameters), dict(seconds).get(change, 1.0))

    config = recipes.in_memory("training.batch_size=64", *overrides)
    return search(config, report(500, parameters), attempt, foresee, limit, enough), asked


def test_the_mildest_change_of_a_kind_that_fits_is_found():
    sizes = {("training.accumulate=16",): 40, ("training.accumulate=8",): 80}
    tried, asked = run(sizes)
    fitting = [t.change for t in tried if t.kind == "batch" and t.fits]
    assert min(fitting, key=lambda c: int(c[0].split("=")[1])) == ("training.accumulate=8",)
    assert ("training.accumulate=4",) in asked and len(asked) == len(set(asked))


def test_every_kind_is_tried_and_the_strongest_first():
    _, asked = run({})
    assert asked[0] == ("compute.remat=full",)
    assert ("training.accumulate=16",) in asked  # a row per device: 64 rows over fsdp 4
    assert ("mesh.fsdp=2", "mesh.tensor=2") in asked
    assert ("compute.remat=offload",) in asked


def test_the_fastest_kind_and_the_fastest_mesh_are_tried_first():
    slow, fast = ("mesh.fsdp=2", "mesh.tensor=2"), ("mesh.fsdp=2", "mesh.context=2")
    seconds = {
        ("compute.remat=dots",): 3.0, ("training.accumulate=2",): 2.0, fast: 0.5, slow: 4.0,
        ("compute.remat=offload",): 2.5,
    }  # fmt: skip
    tried, asked = run({}, seconds=seconds)
    in_order = [fast, slow, ("training.accumulate=16",), ("compute.remat=offload",)]
    strongest = [*in_order, ("compute.remat=full",)]
    assert [c for c in asked if c in strongest] == strongest
    assert {t.change: t.step_seconds_at_least for t in tried}[slow] == 4.0


def test_the_search_ends_when_enough_kinds_fit():
    sizes = {("compute.remat=full",): 40, ("training.accumulate=16",): 40}
    for enough, kinds in ((1, {"remat"}), (2, {"remat", "batch"})):
        tried, _ = run(sizes, enough=enough)
        assert {t.kind for t in tried} == kinds
    assert len({t.kind for t in run(sizes, enough=3)[0]}) == 4


def test_when_nothing_alone_fits_the_strongest_are_tried_together():
    both = ("compute.remat=full", "training.accumulate=16")
    tried, _ = run({both: 90})
    assert [t.change for t in tried if t.fits] == [both]


def test_a_change_that_cannot_be_compiled_says_why_and_does_not_end_the_search():
    tried, _ = run({("compute.remat=offload",): CompileFailed("no host memory")})
    (offload,) = [t for t in tried if t.change == ("compute.remat=offload",)]
    assert (offload.fits, offload.failure) == (False, "no host memory")


def test_compilations_are_bounded():
    assert len(run({}, limit=3)[1]) == 3
    assert run({}, limit=0)[1] == []


def test_a_state_that_cannot_fit_is_not_compiled():
    spread = ("mesh.fsdp=2", "mesh.tensor=2")
    tried, asked = run({spread: 90}, parameters=40, states={spread: 99})
    assert asked == [spread] and tried[-1].change == spread
    tried, asked = run({}, parameters=40)
    assert asked == [] and tried
    assert all((t.fits, t.hbm_bytes_per_device) == (False, 120) and t.failure for t in tried)
    assert all(t.kind == "mesh" or "param_dtype" in t.change[-1] for t in tried)


def test_smaller_parameters_are_tried_when_they_make_the_state_fit():
    smaller = ("compute.param_dtype=bfloat16",)
    tried, asked = run({smaller: 90}, parameters=40, states={smaller: 80})
    assert asked == [smaller] and tried[-1].fits


def search_evaluation(size, evaluations, sizes=()):
    """Searches from an evaluation of 500 bytes; gives what was asked for."""
    asked = []

    def attempt(change):
        asked.append(change)
        return report(dict(sizes).get(change, size), evaluation=evaluations.get(change, 300))

    config = recipes.in_memory("training.batch_size=64", "eval.batch_size=64")
    first = report(size, evaluation=500)
    return search(config, first, attempt, lambda _: Foreseen(30, 1.0), 20, 9), asked


def test_an_evaluation_that_does_not_fit_gets_fewer_rows_and_nothing_else():
    tried, asked = search_evaluation(50, {("eval.batch_size=4",): 90})
    assert asked == [("eval.batch_size=4",)]  # a row per device of fsdp 4
    assert (tried[0].fits, tried[0].eval_hbm_bytes_per_device) == (True, 90)


def test_when_its_fewest_rows_do_not_fit_the_mesh_changes_with_fewer_still():
    both = ("mesh.fsdp=2", "mesh.tensor=2", "eval.batch_size=2")
    tried, asked = search_evaluation(50, {both: 90})
    assert [t.change for t in tried if t.fits] == [both]
    assert not any("remat" in c[0] or "accumulate" in c[0] for c in asked), "the step's alone"


def test_a_change_of_the_step_is_tried_with_an_evaluation_that_fits():
    full = ("compute.remat=full", "eval.batch_size=4")
    tried, _ = search_evaluation(500, {("eval.batch_size=4",): 90, full: 90}, {full: 80})
    assert full in [t.change for t in tried if t.fits]


def test_every_change_is_a_valid_override():
    before = recipes.in_memory("training.batch_size=64")
    _, asked = run({})
    assert asked
    for change in asked:
        data = recipe_loader.override(recipe_loader.to_dict(before), change)
        assert recipe_loader.validate(Config, data, "test") != before
