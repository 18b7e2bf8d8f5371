"""What a resumed run may change: what leaves its steps as they were, with a note in its folder."""

import json
import re
import shutil

import numpy as np
import pytest

from jllama.config import recipe as configs
from jllama.errors import UserError
from jllama.train import loop
from jllama.train.changes import check_changes, note_changes
from jllama.train.metrics import read

CONSTANT = "training.schedule={kind: constant, peak: 0.01, warmup_steps: 2}"
WSD = "training.schedule={kind: wsd, peak: 0.01, warmup_steps: 2, decay_steps: 4, floor: 0.1}"


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def begun(text, one_device, tmp_path_factory):
    """The folder of a run that was stopped at step 2 of 4."""
    folder = tmp_path_factory.mktemp("begun")
    loop.train(load(text, f"run.folder={folder}", "run.stop_after=2"))
    return folder / "run"


@pytest.fixture
def resume(text, begun, tmp_path):
    """A function of overrides that goes on from a copy of `begun`."""
    shutil.copytree(begun, tmp_path / "run")
    return lambda *overrides: loop.train(load(text, f"run.folder={tmp_path}", *overrides))


def load(text, *overrides):
    return configs.load(text, ["training.steps=4", "eval.every=0", CONSTANT, *overrides])


def changes(folder):
    return [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in read(folder / "metrics.jsonl") if "loss" in line]


ORDER_OF_SUMS = {
    "training.accumulate": "2", "compute.remat": "full", "compute.loss_block": "40",
    "compute.scan_unroll": "2", "compute.attention": "{kind: reference}",
}  # fmt: skip


def test_the_order_of_sums_may_change_and_the_folder_says_so(resume, text, tmp_path, capfd):
    whole = loop.train(load(text, f"run.folder={tmp_path / 'whole'}"))
    result = resume(*(f"{key}={value}" for key, value in ORDER_OF_SUMS.items()))
    assert result.done
    np.testing.assert_allclose(losses(result.folder), losses(whole.folder), rtol=1e-5)
    (line,) = changes(result.folder)
    assert line["step"] == 2
    assert line["changes"]["training.accumulate"] == [1, 2]
    assert line["changes"]["compute.attention.kind"] == ["auto", "reference"]
    assert all(any(key.startswith(k) for key in line["changes"]) for k in ORDER_OF_SUMS)
    assert "note: from step 2 on: compute.attention.block: " in capfd.readouterr().err
    assert not (whole.folder / "changes.jsonl").exists()


def test_another_config_gets_another_name_or_the_folder_of_a_deleted_run(resume, tmp_path):
    other = ("training.schedule.peak=0.02", "run.stop_after=1")
    with pytest.raises(UserError, match=r"choose another run\.name .* or delete the folder$"):
        resume(*other)
    assert resume(*other, "run.name=other").folder == tmp_path / "other"
    shutil.rmtree(tmp_path / "run")
    assert resume(*other).steps == 1


def test_text_and_tokenizer_may_move(resume, text, begun, tmp_path):
    shutil.copytree(text.parent, tmp_path / "moved")
    files = [f"data.train.0.source.files=[{tmp_path / 'moved' / 'train.txt'}]"]
    result = resume(*files, "tokenizer.kind=file", f"tokenizer.path={begun}", "run.stop_after=3")
    assert result.steps == 3
    keys = changes(result.folder)[0]["changes"]
    assert {"data.train.0.source.files", "tokenizer.path"} <= keys.keys()


def test_another_tokenizer_is_refused(resume, text, tmp_path):
    other = loop.train(
        load(text, f"run.folder={tmp_path / 'other'}", "tokenizer.vocab_size=310",
             "run.stop_after=1")
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"^tokenizer\.path=.*: is not the tokenizer that the run"
    ) as error:
        resume("tokenizer.kind=file", f"tokenizer.path={other.folder}")
    way = re.search(r"began with: --(\S+) is$", str(error.value))[1]
    assert resume("tokenizer.kind=file", way, "run.stop_after=3").steps == 3


def test_held_out_text_may_be_added_and_is_known_from_then_on(resume, text, tmp_path):
    def held_out(content):
        (tmp_path / "more.txt").write_text(content)
        return (
            "data.held_out=[{name: more, source: {kind: text, files: ["
            f"{tmp_path / 'more.txt'}]}}}}]"
        )

    result = resume(held_out("x not in y " * 30), "run.stop_after=3")
    digests = json.loads((result.folder / "data.json").read_text())["held_out"]
    assert digests.keys() == {"held_out", "more"}
    changed = held_out("y not in x " * 30)
    with pytest.raises(UserError, match="held_out source more is not the text"):
        loop.train(load(text, f"run.folder={tmp_path}", changed, f"data.prepare.folder={tmp_path}"))


def test_the_model_to_start_from_may_move_but_not_change(text, begun, tmp_path):
    def train(initial, *overrides):
        return loop.train(
            load(text, f"run.folder={tmp_path}", f"training.init_from={initial}", *overrides)
        )

    shutil.copytree(begun, tmp_path / "moved")
    folder = train(begun, "run.stop_after=2").folder
    train(begun, "run.stop_after=2")
    assert not (folder / "changes.jsonl").exists()
    assert train(tmp_path / "moved", "run.stop_after=3").steps == 3
    (line,) = changes(folder)
    assert line["changes"] == {"training.init_from": [str(begun), str(tmp_path / "moved")]}
    said = r"^training\.init_from=.*: its parameters are not those that the run in .*began with"
    with pytest.raises(UserError, match=said) as error:
        train(folder)
    named = re.search(r"began with \((\S+)\); name that again", str(error.value))[1]
    assert train(named).done


@pytest.fixture
def check(text, tmp_path):
    """A function of the step, and of overrides before and now, that checks the change."""

    def check(step, before, now):
        (tmp_path / "config.yaml").write_text(configs.to_yaml(load(text, *before)))
        return check_changes(tmp_path, load(text, *now), step)

    return check


@pytest.mark.parametrize(
    ("step", "before", "now"),
    [
        (4, [], ["training.steps=9"]),
        (3, [], ["training.steps=3"]),
        (9, [WSD, "training.steps=13"], [WSD, "training.steps=20"]),
        (3, [WSD, "training.steps=13"], [WSD, "training.steps=7"]),
        (9, ["training.steps=20"], [WSD, "training.steps=13"]),
        (2, ["training.schedule={kind: cosine, peak: 0.01, warmup_steps: 2, floor: 0}"],
         ["training.schedule={kind: cosine, peak: 0.01, warmup_steps: 2, floor: 0}",
          "training.steps=9"]),
    ],
)  # fmt: skip
def test_a_schedule_may_change_beyond_the_steps_that_were_taken(check, step, before, now):
    assert check(step, before, now)


@pytest.mark.parametrize(
    ("step", "before", "now"),
    [
        (10, [WSD, "training.steps=13"], [WSD, "training.steps=20"]),
        (4, [WSD, "training.steps=13"], [WSD, "training.steps=7"]),
        (3, ["training.schedule={kind: cosine, peak: 0.01, warmup_steps: 2, floor: 0}"],
         ["training.schedule={kind: cosine, peak: 0.01, warmup_steps: 2, floor: 0}",
          "training.steps=9"]),
        (1, [], ["training.schedule.peak=0.02"]),
    ],
)  # fmt: skip
def test_a_schedule_that_gives_the_steps_taken_other_rates_is_refused(check, step, before, now):
    with pytest.raises(UserError, match=rf"the learning rates of the first {step} steps depend"):
        check(step, before, now)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (["data.held_out={from: train, one_in: 25}"], ["data.held_out={from: train, one_in: 10}"]),
        ([], ["data.held_out={from: train, one_in: 10}"]),
        (["data.held_out={from: train, one_in: 10}"], ["data.held_out=[]"]),
    ],
)
def test_another_share_is_refused_because_the_run_trained_on_it(check, before, now):
    with pytest.raises(UserError, match=r"another config: data\.held_out") as error:
        check(2, before, now)
    assert "resume_from" not in str(error.value)


def test_fewer_steps_than_were_taken_are_refused(check):
    with pytest.raises(UserError, match=r"^training\.steps=3: .* is at step 4"):
        check(4, ["training.steps=9"], ["training.steps=3"])


def test_reports_may_change_without_a_note(check):
    assert check(2, [], ["run.log_every=7", "checkpoint.keep=9", "data.prefetch=0"]) == {}
    reply = ["data.packing={kind: whole}", "data.objective={kind: reply}"]
    assert check(2, reply, [*reply, "data.objective.no_marker=predict"]) == {}


def test_the_models_length_may_change_where_no_rope_depends_on_it(check):
    assert check(2, ["model.max_length=99"], []).keys() == {"model.max_length"}
    dynamic = ["model.rope={kind: dynamic, factor: 2.0, original_length: 48}"]
    with pytest.raises(UserError, match=r"another config: model\.max_length: 99 before"):
        check(2, [*dynamic, "model.max_length=99"], dynamic)


def test_notes_of_steps_that_a_lost_checkpoint_took_back_count_from_its_step(tmp_path, capfd):
    note_changes(tmp_path, 6, {"compute.remat": ("none", "full")})
    note_changes(tmp_path, 4, {})
    assert changes(tmp_path) == [{"step": 4, "changes": {"compute.remat": ["none", "full"]}}]
