"""What a path holds is asked once, and whatever opens it works from the answer."""

import json
import re
import shutil
from pathlib import Path

import pytest

from jllama.config import ComputeConfig, LoraConfig, RunConfig, StoredConfig
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.files import storage
from jllama.store.find import complete_steps, find, latest_step

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = recipes.load_model("tiny")
COMPUTE = ComputeConfig(dtype="float32")


def ours(folder, *steps, **changes):
    folder.mkdir(parents=True)
    stored = StoredConfig(model=MODEL, compute=COMPUTE, **changes)
    (folder / "config.yaml").write_text(recipes.to_yaml(stored))
    for step in steps:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    return folder


@pytest.fixture
def run(tmp_path):
    return ours(tmp_path / "run", 5, 40, run=RunConfig(name="run"))


@pytest.fixture
def looks(monkeypatch):
    """The folders that are listed, and the files that are asked for one by one."""
    asked = []

    def noted(name):
        real = getattr(storage, name)

        def ask(path):
            asked.append((name, Path(path).name))
            return real(path)

        monkeypatch.setattr(storage, name, ask)

    for name in ("listing", "exists", "is_folder", "stat"):
        noted(name)
    return asked


@pytest.mark.parametrize("name", ["hf-llama2", "meta-llama2", "peft-dora"])
def test_a_folder_of_others_is_known_by_one_listing(name, looks):
    found = find(FIXTURES / name)
    assert found.format == name.partition("-")[0]
    assert found.is_adapter == (found.format == "peft")
    assert not found.is_run and found.stored is None
    assert set(found.files) == {file.name for file in (FIXTURES / name).iterdir()}
    assert looks == [("listing", name)]


def test_a_run_is_known_by_one_listing_and_its_newest_step_by_another(run, looks):
    (run / "checkpoints" / "60.orbax-checkpoint-tmp-3").mkdir()  # that a kill left
    found = find(run)
    assert found.is_run and not found.is_adapter and found.step is None
    assert found.stored.model == MODEL
    assert looks == [("listing", "run")]
    assert found.checkpoint() == 40 == latest_step(run)
    assert complete_steps(run / "checkpoints") == [5, 40]


def test_a_step_of_a_run_is_known_by_two_listings(run, looks, monkeypatch):
    found = find(run / "checkpoints" / "5")
    assert (found.folder, found.step, found.checkpoint()) == (run, 5, 5)
    assert looks == [("listing", "5"), ("listing", "run")]
    monkeypatch.chdir(run / "checkpoints")
    assert find(Path("5")).folder == run


def test_an_overlay_is_an_adapter_and_a_run_without_steps_has_no_checkpoint(tmp_path):
    adapt = LoraConfig(kind="lora", rank=2, alpha=4.0)
    found = find(ours(tmp_path / "overlay", run=RunConfig(name="overlay"), adapt=adapt))
    assert found.is_adapter and found.is_run
    with pytest.raises(UserError, match=r"overlay: the run has no checkpoint yet; train it first"):
        found.checkpoint()


def test_an_adapter_config_beside_a_model_is_an_adapter_unless_a_format_is_asked_for(tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(FIXTURES / "peft-dora", folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert find(folder).format == "peft"
    assert find(folder, "hf").format == "hf"


def test_an_adapter_in_a_folder_of_its_name_is_found(tmp_path):
    shutil.copytree(FIXTURES / "peft-dora", tmp_path / "saved" / "mine")
    (tmp_path / "saved" / "README.md").write_text("")
    found = find(tmp_path / "saved")
    assert (found.path, found.format) == (tmp_path / "saved" / "mine", "peft")
    shutil.copytree(FIXTURES / "peft-dora", tmp_path / "saved" / "yours")
    with pytest.raises(UserError, match="several adapters, mine, yours; give one"):
        find(tmp_path / "saved")
    assert find(tmp_path / "saved" / "yours").format == "peft"


@pytest.mark.parametrize("name", ["hf-llama2", "meta-llama2", "peft-dora"])
def test_the_file_that_is_missing_is_copied_to_the_weights(name, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(FIXTURES / name, folder)
    for config in ("config.json", "params.json", "adapter_config.json"):
        (folder / config).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"has weights and no \S+; copy it from where") as error:
        find(folder)
    shutil.copy(FIXTURES / name / re.search(r"no (\S+);", str(error.value))[1], folder)
    assert find(folder).format == name.partition("-")[0]


def test_a_path_that_holds_nothing_says_what_it_is(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("gguf/m.gguf", "bare/adapter_model.bin"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"GGUF")
    (run / "params.json").write_text("{}")
    for path, text in (
        (
            tmp_path / "nowhere",
            "nowhere: no such folder; expected a run .*config.json.*params.json",
        ),
        (tmp_path / "empty", "empty: an empty folder; expected"),
        (tmp_path / "gguf", "gguf: holds m.gguf, a GGUF file, which jllama writes and does not"),
        (tmp_path / "gguf" / "m.gguf", "m.gguf: a GGUF file, which jllama writes and does not"),
        (tmp_path / "bare", "bare: has weights and no adapter_config.json; copy it"),
        (tmp_path / "file", "file: a file, give its folder; expected"),
        (run, r"run: may be jllama or meta; .*--from"),
        (run.with_name("run@6"), "run@6: no such folder; the steps .* it: .*/run/checkpoints/6;"),
        (run.parent, "neither a model nor an adapter, but run in it has a config.yaml; expected"),
        (tmp_path / "checkpoints" / "7", f"{tmp_path}: no config.yaml"),
    ):
        with pytest.raises(UserError, match=text):
            find(path)
    assert find(run, "meta").format == "meta"
    with pytest.raises(UserError, match=r"empty: no config\.yaml"):
        find(tmp_path / "empty", "jllama")
