"""Training in a folder: metrics, resuming bit for bit, evaluation, errors, traces.

On one device unless a test says otherwise. Signals are tested in test_train_script.py.
"""

import errno
import fcntl
import itertools
import math
import re
import shutil

import jax
import numpy as np
import pytest
import recipes
from test_metrics import scalars

import jllama
from jllama.config import Config
from jllama.config import recipe as configs
from jllama.errors import UserError
from jllama.flops import parameter_count, train_flops_per_token
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.store.fingerprint import fingerprint
from jllama.train import loop, run
from jllama.train.folder import open_run
from jllama.train.initial import open_initial
from jllama.train.metrics import read
from jllama.train.placement import make_placement
from jllama.train.profile import Profile
from jllama.train.state import define_state, load_state

PEAK = 1e12
STEP_METRICS = {
    "step", "loss", "perplexity", "grad_norm", "learning_rate", "weight", "computed_tokens",
    "seconds", "tokens_per_second", "model_flop_utilisation", "data_wait_seconds",
    "checkpoint_seconds",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def fast():
    """Runs use one device and a made-up peak; yields the train steps that they make."""
    with pytest.MonkeyPatch.context() as patch:
        steps, make = [], run.make_train_step
        patch.setattr(run, "make_placement", placed)
        patch.setattr(run, "peak_flops", lambda dtype: (PEAK, "published"))
        patch.setattr(run, "make_train_step", lambda *a: steps.append(make(*a)) or steps[-1])
        yield steps


def placed(config):
    """On one device, unless the recipe has a mesh for all."""
    return make_placement(config, jax.devices()[: 1 if config.mesh.fsdp < 0 else None])


@pytest.fixture
def recipe(text, tmp_path):
    """A function of overrides that returns the recipe; its runs go to the test's folder."""
    return lambda *overrides: configs.load(text, [f"run.folder={tmp_path}", *overrides])


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """An uninterrupted run and its result."""
    folder = tmp_path_factory.mktemp("whole")
    return loop.train(configs.load(text, [f"run.folder={folder}", "eval.stride=9"]))


def digest(folder, step=10):
    config = configs.load(folder / "config.yaml")
    placement = Placement(make_mesh(config.mesh, jax.devices()[:1]), config.sharding)
    return fingerprint(load_state(folder, step, define_state(config, placement)))


def steps_of(folder):
    return [line for line in read(folder / "metrics.jsonl") if "loss" in line]


def losses(folder):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in steps_of(folder)]


def message(config):
    with pytest.raises(UserError) as error:
        loop.train(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_metric_of_every_step_is_written(whole):
    lines = steps_of(whole.folder)
    assert [line["step"] for line in lines] == list(range(1, 11))
    flops = train_flops_per_token(configs.load(whole.folder / "config.yaml").model, 24)
    for line in lines:
        assert set(line) == STEP_METRICS
        assert all(math.isfinite(value) for value in line.values())
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert line["weight"] < line["computed_tokens"] == 8 * 24
        assert line["tokens_per_second"] == pytest.approx(8 * 24 / line["seconds"])
        used = line["tokens_per_second"] * flops / PEAK
        assert line["model_flop_utilisation"] == pytest.approx(used)
    assert any(line["checkpoint_seconds"] > 0 for line in lines)
    assert lines[0]["loss"] == pytest.approx(math.log(320), rel=0.05)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]


def test_tensorboard_holds_the_values_of_metrics_jsonl(whole):
    board = scalars(whole.folder / "tensorboard")
    lines = read(whole.folder / "metrics.jsonl")
    wanted = {(k, line["step"]): v for line in lines for k, v in line.items() if k != "step"}
    assert board.keys() == wanted.keys()
    assert all(board[key] == pytest.approx(wanted[key], rel=1e-6) for key in wanted)


def test_held_out_text_is_evaluated_during_training_and_at_the_end(whole):
    lines = [x for x in read(whole.folder / "metrics.jsonl") if "eval_loss" in x]
    assert [line["step"] for line in lines] == [5, 10]
    assert lines[1] == {"step": 10} | {f"eval_{k}": v for k, v in whole.eval.items()}
    assert (whole.steps, whole.done) == (10, True)
    assert whole.tokens == sum(line["weight"] for line in steps_of(whole.folder))


def test_the_step_compiles_once_in_a_run(whole, fast):
    assert fast[0]._cache_size() == 1


def test_positions_that_no_row_reaches_are_said_and_the_remedy_ends_it(recipe, whole, capfd):
    def said(name, *more):
        with open_run(recipe(f"run.name={name}", *more)):
            return re.findall(
                r"note: data\.length=.*untrained; (.*) does not claim", capfd.readouterr().err
            )

    (remedy,) = said("a", "sample.max_new_tokens=30")
    assert remedy == "--model.max_length=24 --sample.max_new_tokens=12"
    assert not said("b", "sample.max_new_tokens=30", *remedy.replace("--", "").split())
    assert not said("c", "model.rope={kind: dynamic, factor: 2.0, original_length: 24}")
    assert not said("d", f"training.init_from={whole.folder}")


@pytest.mark.optimized
def test_a_stopped_run_resumes_bit_for_bit(recipe, whole, capfd):
    stopped = loop.train(recipe("run.stop_after=6", "eval.stride=9"))
    assert (stopped.steps, stopped.done, stopped.eval) == (6, False, None)
    assert not stopped.stopped  # run.stop_after stopped it, not a signal
    said = capfd.readouterr().err
    assert "run.stop_after=6: stopped at step 6 of 10, checkpointed" in said
    assert "note: data.length=24 leaves the positions up to model.max_length=48 untrained" in said
    # Keys that no step depends on may change.
    free = ["checkpoint.keep=1", "run.log_every=7", "data.prefetch=0", "eval.every=3"]
    result = loop.train(recipe("eval.stride=9", *free))
    assert "resumed at step 6 of 10" in capfd.readouterr().err
    assert (result.steps, result.done, result.eval) == (10, True, whole.eval)
    assert losses(result.folder) == losses(whole.folder)
    assert digest(result.folder) == digest(whole.folder)
    assert [p.name for p in (result.folder / "checkpoints").iterdir()] == ["10"]


def test_the_first_line_names_parameters_devices_mesh_and_checkpoints(recipe, capfd):
    changes = ["model.vocab_size=400", "mesh.fsdp=4", "mesh.tensor=2"]
    config = recipe("run.stop_after=1", *changes)
    folder = loop.train(config).folder
    lines = capfd.readouterr().err.splitlines()
    said = next(line for line in lines if line.startswith(f"{folder}: "))
    parameters = f"{parameter_count(config.model):,} parameters"
    assert said == (
        f"{folder}: {parameters} on 8 cpu devices, mesh fsdp=4 tensor=2;"
        " a checkpoint every 4 steps; compiling the first step"
    )
    note = "note: 80 of model.vocab_size=400 rows have no piece: the tokenizer has 320"
    assert note in lines
    assert lines.index(note) < lines.index(said)


def test_a_run_without_checkpoints_says_so_and_a_finished_one_compiles_nothing(
    recipe, whole, tmp_path, capfd
):
    shutil.copytree(whole.folder, tmp_path / "run")
    capfd.readouterr()
    loop.train(recipe("eval.stride=9", "checkpoint.every=0"))
    err = capfd.readouterr().err
    end = "on 1 cpu device; no checkpoint before the end (checkpoint.every=0)\n"
    assert end in err
    assert "note: " not in err  # as many pieces as rows


@pytest.mark.optimized
def test_a_run_that_lost_its_last_checkpoint_resumes_from_the_one_before(recipe, whole, tmp_path):
    # A crash leaves metrics of later steps, and half a line.
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 11, "lo')
    result = loop.train(recipe("eval.stride=9"))
    assert losses(result.folder) == losses(whole.folder)
    assert digest(result.folder) == digest(whole.folder)


def test_a_finished_run_is_only_evaluated_again(recipe, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    result = loop.train(recipe("eval.stride=9"))
    assert (result.steps, result.done, result.eval) == (10, True, whole.eval)
    assert read(result.folder / "metrics.jsonl") == read(whole.folder / "metrics.jsonl")


def test_a_run_resumes_on_another_mesh(recipe, whole):
    loop.train(recipe("run.stop_after=6"))
    result = loop.train(recipe("mesh.fsdp=4", "mesh.tensor=2", "eval.stride=9"))
    np.testing.assert_allclose(losses(result.folder), losses(whole.folder), rtol=1e-4)
    assert result.eval == pytest.approx(whole.eval, rel=1e-4)


def test_a_finished_run_without_its_metrics_is_still_evaluated(recipe, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    result = loop.train(recipe("eval.stride=9"))
    assert (result.tokens, result.eval) == (0, whole.eval)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["training.batch_size=16"], "training.batch_size: 8 before, 16 now"),
        (["run.seed=3"], "run.seed: 0 before, 3 now"),
        (["model.num_layers=1"], "model.num_layers: 2 before, 1 now"),
        (["training.schedule={kind: constant, peak: 0.01, warmup_steps: 2}"], "schedule.floor: "),
        (["data.train.0.weight=2"], "data.train.0.weight: 1.0 before, 2.0 now"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else None,
)
def test_another_config_in_the_folder_is_an_error_that_names_the_key(
    recipe, whole, changes, named, tmp_path
):
    shutil.copytree(whole.folder, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.*")}
    said = message(recipe("eval.stride=9", *changes))
    assert named in said
    assert "another run.name" in said
    assert {p: p.read_bytes() for p in (tmp_path / "run").glob("*.*")} == before


def test_a_folder_without_a_checkpoint_takes_any_config(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(configs.to_yaml(recipe("run.seed=3")))
    loop.train(recipe("run.stop_after=1"))
    assert configs.load(tmp_path / "run" / "config.yaml").run.seed == 0


def test_changed_text_in_the_same_files_is_an_error(text, tmp_path):
    shutil.copytree(text.parent, tmp_path / "text")
    moved = [
        f"run.folder={tmp_path}",
        f"data.prepare.folder={tmp_path / 'prepared'}",
        f"data.train.0.source.files=[{tmp_path / 'text' / 'train.txt'}]",
    ]
    loop.train(configs.load(text, [*moved, "run.stop_after=1"]))
    (tmp_path / "text" / "train.txt").write_text("\f".join(recipes.texts(200, 9)))
    shutil.rmtree(tmp_path / "prepared")
    said = message(configs.load(text, moved))
    assert "the train source train is not the text that this run began with" in said
    assert said.endswith("choose another run.name or bring the text back")
    assert loop.train(configs.load(text, [*moved, "run.name=other", "run.stop_after=1"])).steps == 1
    shutil.copy(text.parent / "train.txt", tmp_path / "text")
    shutil.rmtree(tmp_path / "prepared")
    assert loop.train(configs.load(text, [*moved, "run.stop_after=2"])).steps == 2


def test_a_file_where_checkpoints_belong_is_a_one_line_error(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    assert "run/checkpoints: not writable: File exists" in message(recipe())


def test_a_second_process_in_the_folder_is_refused(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = message(recipe())
        assert said.endswith("run: another process trains here; choose another run.name")
        with open_run(recipe("run.name=other")) as (folder, _):
            assert folder == tmp_path / "other"


def test_storage_without_locks_takes_one_run_a_folder(recipe, tmp_path, monkeypatch, capfd):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with open_run(recipe("run.name=one")), open_run(recipe("run.name=two")):
        err = capfd.readouterr().err
    for name in ("one", "two"):
        assert f"{tmp_path / name}: no locks on this storage; start one run per folder" in err


def test_a_folder_that_cannot_be_made_is_an_error(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    assert "not writable" in message(recipe(f"run.folder={tmp_path / 'file'}"))


def test_a_step_that_is_not_finite_ends_the_run_before_it_is_saved(recipe, tmp_path):
    huge = "training.schedule={kind: constant, peak: 1e30, warmup_steps: 0}"
    said = message(recipe(huge, "checkpoint.every=2", "eval.every=0"))
    assert "step 2: grad_norm is nan" in said  # the gradient is the first to overflow
    assert "lower training.schedule.peak" in said
    assert "stays at step 0" in said and said.endswith("start again")
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [1]
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert loop.train(recipe("eval.every=0", "run.stop_after=3")).steps == 3
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [1, 2, 3]


def test_what_is_said_of_a_step_that_is_not_finite_can_be_followed(recipe, tmp_path, monkeypatch):
    make = run.make_train_step

    def diverging(*arguments):
        step, losses = make(*arguments), itertools.chain([0.0], itertools.repeat(math.nan))

        def train_step(*state_and_batch):
            state, metrics = step(*state_and_batch)
            return state, metrics | {"loss": metrics["loss"] + next(losses)}

        return train_step

    with monkeypatch.context() as patch:
        patch.setattr(run, "make_train_step", diverging)
        said = message(recipe("checkpoint.every=1", "eval.every=0"))
    assert said.startswith("step 2: loss is nan; ")
    initial = re.search(r"--training\.init_from=(\S+)", said)[1]
    assert initial == str(tmp_path / "run" / "checkpoints" / "1")
    again = recipe(f"training.init_from={initial}", "run.name=again")
    assert str(open_initial(again).place) == initial
    assert loop.train(recipes.replace(again, run={"stop_after": 1})).steps == 1


def test_a_broken_checkpoint_names_the_step_before_it(recipe, tmp_path):
    loop.train(recipe("checkpoint.every=2", "checkpoint.keep=null", "run.stop_after=6"))
    steps = tmp_path / "run" / "checkpoints"
    assert {x.name for x in steps.iterdir()} == {"2", "4", "6"}
    shutil.rmtree(steps / "6" / "trainable")
    said = message(recipe())
    assert said.startswith(f"{steps / '6'}: not readable")
    assert said.endswith(f"delete {steps / '6'}: step 4 is before it")
    shutil.rmtree(steps / "6")
    assert loop.train(recipe("run.stop_after=5", "checkpoint.every=0")).steps == 5


def test_a_checkpoint_under_another_name_is_refused(recipe, tmp_path):
    loop.train(recipe("run.stop_after=3", "checkpoint.every=0"))
    steps = tmp_path / "run" / "checkpoints"
    (steps / "3").rename(steps / "9")
    said = message(recipe())
    assert f"{steps / '9'}: holds the state of step 3" in said
    assert said.endswith("; give it that name back, or delete it")
    (steps / "9").rename(steps / "3")
    assert loop.train(recipe("run.stop_after=4")).steps == 4
    (steps / "4").rename(steps / "9")
    assert "; give it that name back, or delete it" in message(recipe())
    shutil.rmtree(steps / "9")
    assert loop.train(recipe("run.stop_after=5")).steps == 5


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a b c " * 100, r"sample\.prompt: its \d+ tokens and sample\.max_new_tokens=5 exceed"),
        ("a <FILL_ME> b", r"sample\.prompt: infilling: the tokenizer has no"),
    ],
)
def test_a_sample_that_cannot_be_made_is_known_before_the_first_step(
    recipe, tmp_path, prompt, said
):
    wanted = recipe(f"sample.prompt={prompt}", "sample.max_new_tokens=5")
    assert re.search(said, message(wanted))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    if "exceed" in said:  # the ways out
        for prompt, new in (("a b c", 5), ("a b c " * 7, 1)):
            keys = (f"sample.prompt={prompt}", f"sample.max_new_tokens={new}")
            with open_run(recipe(*keys, "run.name=short")):
                pass


# A trace that reaches beyond the last step ends with it.
@pytest.mark.parametrize("profile", ["2:4", "8:100"])
def test_a_profile_holds_the_named_scopes_of_a_block(recipe, tmp_path, profile):
    loop.train(recipe(f"run.profile={profile}", "eval.every=0", "checkpoint.every=0"))
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for scope in (b"/attention/", b"/mlp/", b"(loss)/", b"/optimizer/"):
        assert scope in content, scope


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("7:8", "note: run.profile=7:8 traces nothing: the run goes from step 0 to step 3"),
        ("1:8", "note: run.profile=1:8 traces up to step 3: the run goes from step 0 to step 3"),
        ("1:3", ""),
    ],
)
def test_steps_that_a_profile_does_not_reach_are_said(tmp_path, profile, said):
    assert Profile(profile, 3, tmp_path).note(0) == said
    resumed = Profile(profile, 3, tmp_path).note(2)
    assert resumed.startswith(
        f"note: run.profile={profile} traces nothing: the run goes from step 2"
    )


def nats(model, stream, starts, row_starts, length):
    """-log p, in float64, of each token of a stream except the first of each document.

    `starts` are the positions of the documents' first tokens. The target at p is predicted from the
    tokens from `row_starts[p]` on that belong to its document.
    """
    texts = {}
    for p in range(1, len(stream)):
        first = max(row_starts[p], max(s for s in starts if s <= p))
        if first < p:
            texts.setdefault(first, []).append(p)
    firsts = sorted(texts)
    rows = np.zeros((len(firsts), length + 1), np.int32)
    for row, first in zip(rows, firsts, strict=True):
        known = stream[first : first + length + 1]
        row[: len(known)] = known
    logits = np.asarray(model.logits(rows), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return [
        -log_p[i, p - first - 1, stream[p]] for i, first in enumerate(firsts) for p in texts[first]
    ]


def nats_of(model, documents, stride):
    """Returns the `nats` of a source's documents in its rows, and the documents' UTF-8 bytes."""
    ids = [[1, *model.tokenizer.encode(text), 2] for text in documents]
    ordered = ids[0::2] + ids[1::2]  # two shards, one after the other
    stream = np.concatenate(ordered)
    starts = np.cumsum([0, *map(len, ordered)])[:-1].tolist()
    last = [-(-p // stride) * stride for p in range(len(stream))]  # of the row that scores p
    found = nats(model, stream, starts, [max(0, x - 24) for x in last], 24)
    assert len(found) == len(stream) - len(documents)
    return found, sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize("stride", [24, 9])
def test_bits_per_byte_equal_those_computed_with_the_loaded_model(recipe, whole, tmp_path, stride):
    found, size = nats_of(jllama.load(whole.folder), recipes.texts(12, seed=2), stride)
    wanted = {"loss": np.mean(found), "bits_per_byte": sum(found) / math.log(2) / size}
    got = whole.eval
    if stride == 24:  # the same parameters, evaluated in whole rows
        shutil.copytree(whole.folder, tmp_path / "run")
        got = loop.train(recipe()).eval
    assert got == pytest.approx(wanted, rel=1e-5)


def test_held_out_sources_are_weighted_by_their_tokens_and_bytes(recipe, tmp_path):
    texts = recipes.texts(12, seed=2)
    parts = {"small": texts[:2], "large": ["数据" * 9, *texts[2:]]}
    held_out = []
    for name, some in parts.items():
        (tmp_path / f"{name}.txt").write_text("\f".join(some), encoding="utf-8")
        text = {"kind": "text", "files": [str(tmp_path / f"{name}.txt")], "separator": "\f"}
        held_out.append({"name": name, "source": text})
    data = configs.to_dict(recipe("eval.max_rows=0", "run.stop_after=5"))
    data["data"]["held_out"] = held_out
    folder = loop.train(configs.validate(Config, data, "test")).folder
    (line,) = [x for x in read(folder / "metrics.jsonl") if "eval_loss" in x]
    model = jllama.load(folder)
    found = [nats_of(model, some, 24) for some in parts.values()]
    nll, size = np.concatenate([nats for nats, _ in found]), sum(size for _, size in found)
    assert line["eval_loss"] == pytest.approx(nll.mean(), rel=1e-5)
    assert line["eval_bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / size, rel=1e-5)
    # The mean of the sources' means would be another number.
    each = [np.mean(nats) for nats, _ in found]
    assert abs(np.mean(each) - nll.mean()) > 1e-3
