"""A run that begins from a model's parameters, in whichever format."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes as small
import tiny
import yaml

import jllama
from jllama import cli
from jllama.adapt.lora import overlay_specs
from jllama.config import (
    AdaptiveRopeScaling,
    LinearRopeScaling,
    LoraConfig,
    MeshConfig,
    NoRopeScaling,
    ShardingConfig,
    TrainedTokenizer,
    YarnRopeScaling,
)
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.interop import hf
from jllama.interop.peft_write import write_adapter
from jllama.model import llama
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.store import checkpoint
from jllama.store.find import find
from jllama.store.model import architecture_at, open_model
from jllama.store.write import write_model
from jllama.text.added import AddedToken
from jllama.text.spm import SentencePieceTokenizer
from jllama.text.tokenizer import load_tokenizer
from jllama.text.vocabulary import train_sentencepiece
from jllama.train.folder import open_run
from jllama.train.initial import open_initial
from jllama.train.loop import train

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = tiny.config(vocab_size=320, num_layers=2, num_kv_heads=2, max_length=48)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return small.on_disk(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def params():
    return tiny.params(MODEL)


@pytest.fixture(scope="module", params=["hf", "jllama"])
def source(request, tmp_path_factory, params):
    folder = tmp_path_factory.mktemp("models") / request.param
    if request.param == "hf":
        hf.write_folder(folder, MODEL, params, None)
    else:
        write_model(folder, MODEL, params, None)
    return folder


LORA = "adapt={kind: lora, rank: 2, alpha: 4, targets: [q]}"


@pytest.fixture(scope="module")
def own(text, tmp_path_factory):
    """A run of one step, with another tokenizer than the recipe's."""
    keys = ["tokenizer.vocab_size=310", "run.name=own"]
    return train(recipe(text, tmp_path_factory.mktemp("own"), None, *keys)).folder


@pytest.fixture(scope="module")
def adapters(own, tmp_path_factory):
    """Adapters over the run: ours with its tokenizer, and PEFT's with none."""
    lora = LoraConfig(kind="lora", rank=2, alpha=4.0, targets=("q",))
    config, folder = open_model(find(own)).config, tmp_path_factory.mktemp("adapters")
    specs = overlay_specs(config, tiny.compute(), lora)
    overlay = jax.tree.map(lambda spec: np.ones(spec.shape, np.float32), specs)
    write_adapter(folder / "peft", config, lora, overlay, str(own))
    assert cli.main(["convert", str(folder / "peft"), str(folder / "ours"), "--to", "jllama"]) == 0
    load_tokenizer(own).save(folder / "ours")
    return folder / "ours", folder / "peft"


def recipe(text, runs, source, *more):
    """One step, too small to change a bit."""
    return recipes.load(
        text,
        [
            *([f"training.init_from={source}"] if source else []),
            "training.schedule.peak=1e-30",
            "training.schedule.warmup_steps=0",
            "training.steps=2",
            "run.stop_after=1",
            f"run.folder={runs}",
            "mesh.fsdp=4",
            "mesh.tensor=2",
            *more,
        ],
        architecture_at,
    )


def test_a_run_begins_from_a_models_parameters_and_resumes_without_it(
    text, source, params, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    config = recipe(text, tmp_path / "runs", copy)
    first = train(config)
    assert first.steps == 1
    run = tmp_path / "runs" / "run"
    jax.tree.map(np.testing.assert_array_equal, jllama.load(run).params, params)
    shutil.rmtree(copy)
    assert train(small.replace(config, run={"stop_after": 0})).done
    # A run is a model too.
    again = train(recipe(text, tmp_path / "more", run, "run.name=again"))
    assert again.steps == 1
    jax.tree.map(
        np.testing.assert_array_equal, jllama.load(tmp_path / "more" / "again").params, params
    )


def test_another_model_is_refused_by_key_before_anything_is_made(text, source, tmp_path):
    config = recipe(text, tmp_path / "runs", source, "model.ffn_dim=96")
    said = rf"init_from=.*: model\.ffn_dim is 96, there 80; --model={source} takes its model$"
    with pytest.raises(UserError, match=said):
        train(config)
    config = recipe(text, tmp_path / "runs", source, "model.vocab_size=336")
    with pytest.raises(UserError, match=r"is 336, there 320; more rows .*vocabulary grow$"):
        train(config)
    few = recipe(
        text, tmp_path / "runs", source, "model.vocab_size=318", "tokenizer.vocab_size=310"
    )
    with pytest.raises(UserError, match=rf"is 318, there 320; --model={source} takes its model$"):
        train(few)
    assert open_initial(recipe(text, "unused", source, f"model={source}")).config == MODEL
    more = [AddedToken(f"<{i}>", 310 + i) for i in range(26)]
    texts = [Path(__file__).read_text()]
    trained = train_sentencepiece(texts, TrainedTokenizer(kind="train", vocab_size=310))
    SentencePieceTokenizer(trained.model, added=more).save(tmp_path / "more")
    grow = ("vocabulary", "grow", source, tmp_path / "more", tmp_path / "grown", "--rows", "mean")
    assert cli.main([*map(str, grow)]) == 0
    grown = recipe(text, tmp_path / "runs", tmp_path / "grown", "model.vocab_size=336")
    assert open_initial(grown).config.vocab_size == 336
    config = recipe(text, tmp_path / "runs", tmp_path / "absent")
    with pytest.raises(UserError, match=r"^training\.init_from: .*absent: no such folder"):
        train(config)
    assert not (tmp_path / "runs" / "run" / "checkpoints").exists()


def test_a_model_that_differs_from_a_runs_takes_it_with_its_tokenizer(text, own, tmp_path):
    wider = ["model.ffn_dim=96", "run.name=next"]
    for base in (own, own / "checkpoints" / "1"):
        said = rf"is 96, there 80; --from={base} takes its model and tokenizer too$"
        with pytest.raises(UserError, match=said):
            open_initial(recipe(text, tmp_path, base, *wider))
        config = recipe(text, tmp_path, None, f"from={base}", f"run.name={base.name}")
        with open_run(config, initial=open_initial(config)) as (folder, _):
            assert load_tokenizer(folder).digest == load_tokenizer(own).digest


def test_a_model_that_differs_from_an_adapters_takes_its_base(text, own, adapters, tmp_path):
    for adapter, model in ((adapters[0], adapters[0]), (adapters[1], own)):
        said = rf"is 96, there 80; --model={model} takes its model$"
        with pytest.raises(UserError, match=said):
            open_initial(recipe(text, tmp_path, adapter, LORA, "model.ffn_dim=96"))
        config = recipe(text, tmp_path, adapter, LORA, f"model={model}")
        assert open_initial(config).config.ffn_dim == 80


def test_a_recipe_takes_the_architecture_of_a_models_folder(text, source, tmp_path):
    runs, wanted = tmp_path / "runs", dataclasses.replace(MODEL, max_length=40)
    config = recipe(text, runs, source, f"model={source}", "model.max_length=40")
    assert config.model == wanted
    file = tmp_path / "base.yaml"
    changes = yaml.safe_load(text.read_text())
    changes["model"] = {"base": str(source), "max_length": 40}
    file.write_text(yaml.safe_dump(changes))
    assert recipe(file, runs, source).model == wanted
    with pytest.raises(UserError, match=r"^model: .*absent"):
        recipe(text, runs, source, f"model={tmp_path / 'absent'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^model: .*empty: an empty folder"):
        recipe(text, runs, source, f"model={tmp_path / 'empty'}")
    adapter = FIXTURES / "peft-dora"
    with pytest.raises(UserError, match=r"^model: .*peft-dora: is an adapter of PEFT's; name its"):
        recipe(text, runs, source, f"model={adapter}")
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    file = ("tokenizer.kind=file", "tokenizer.path=none")
    recipe(text, runs, source, f"model={FIXTURES / base}", *file)


@pytest.fixture(scope="module", params=["hf", "jllama"])
def published(request, tmp_path_factory, params):
    """A model's folder with its tokenizer."""
    texts = [Path(__file__).read_text()]
    tokenizer = train_sentencepiece(texts, TrainedTokenizer(kind="train", vocab_size=310))
    folder = tmp_path_factory.mktemp("published") / request.param
    write = hf.write_folder if request.param == "hf" else write_model
    write(folder, MODEL, params, tokenizer)
    return folder


def test_from_is_model_parameters_and_tokenizer_at_once(text, published, params, tmp_path):
    config = recipe(text, tmp_path / "runs", None, f"from={published}", "data.length=24")
    assert config.model == dataclasses.replace(MODEL, init=config.model.init)
    assert config.training.init_from == config.tokenizer.path == str(published)
    assert train(config).steps == 1
    tuned = jllama.load(tmp_path / "runs" / "run")
    jax.tree.map(np.testing.assert_array_equal, tuned.params, params)
    assert tuned.tokenizer.digest == jllama.load(published).tokenizer.digest
    # The folder's config has no word of it: it is resolved.
    assert "from" not in yaml.safe_load((tmp_path / "runs" / "run" / "config.yaml").read_text())


def test_what_from_stands_for_can_each_still_be_set(text, published, tmp_path):
    runs = tmp_path / "runs"
    own = recipe(text, runs, None).tokenizer
    changed = recipe(text, runs, None, "model.max_length=40", f"from={published}")
    assert changed.model.max_length == 40 and changed.training.init_from == str(published)
    fresh = recipe(text, runs, None, f"from={published}", "training.init_from=")
    assert fresh.training.init_from == "" and fresh.model.vocab_size == MODEL.vocab_size
    # In a file its own keys win.
    file = tmp_path / "recipe.yaml"
    file.write_text(f"from: {published}\n" + text.read_text())
    config = recipe(file, runs, None)
    assert config.tokenizer == own and config.model == recipe(text, runs, None).model
    keys = yaml.safe_load(text.read_text())
    del keys["model"], keys["tokenizer"], keys["training"]["init_from"]
    file.write_text(yaml.safe_dump(keys | {"from": str(published)}))
    config = recipe(file, runs, None)
    assert config.model.ffn_dim == MODEL.ffn_dim and config.tokenizer.path == str(published)
    assert config.training.init_from == str(published)
    with pytest.raises(UserError, match=r"^from: tiny: no such folder; name a run or a model's"):
        recipe(file, runs, None, "from=tiny")  # which is an architecture alone
    with pytest.raises(UserError, match=r"^from: \[\]: expected the path"):
        file.write_text(yaml.safe_dump(keys | {"from": []}))
        recipe(file, runs, None)


def test_another_tokenizer_is_said(text, own, adapters, tmp_path, capsys):
    said = "the tokenizer is not that of training.init_from="
    step = own / "checkpoints" / "1"
    for number, (where, more, path) in enumerate((
        (own, [], own),
        (step, [], step),  # which has its run's
        (adapters[0], [LORA], adapters[0]),
        (adapters[1], [LORA], own),  # which has none
    )):  # fmt: skip
        other = recipe(text, tmp_path, where, *more, f"run.name={number}")
        with open_run(other, initial=open_initial(other)):
            error = capsys.readouterr().err
        assert f"{said}{where}, " in error and f"--tokenizer.path={path} takes it\n" in error
        keys = ["tokenizer.kind=file", f"tokenizer.path={path}", f"run.name=with-{number}"]
        same = recipe(text, tmp_path, where, *more, *keys)
        with open_run(same, initial=open_initial(same)) as (folder, _):
            assert said not in capsys.readouterr().err
            assert load_tokenizer(folder).digest == load_tokenizer(own).digest


def test_another_rope_is_another_function_of_the_same_shapes_and_is_said(
    text, source, tmp_path, capsys
):
    train(recipe(text, tmp_path / "runs", source, "model.rope_theta=1e6", "model.max_length=64"))
    said = capsys.readouterr().err
    assert "model.rope_theta is 1000000.0, there 10000.0" in said
    assert "model.max_length is 64, there 48" in said


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (
            LinearRopeScaling(kind="linear", factor=2.0),
            "factor=2 takes model.max_length=192 to 96 positions, and it was trained for 48; the"
            " factor that fits is 4",
        ),
        (
            LinearRopeScaling(kind="linear", factor=8.0),
            "factor=8 takes model.max_length=192 to 24 positions, and it was trained for 48; the"
            " factor that fits is 4",
        ),
        (LinearRopeScaling(kind="linear", factor=4.0), ""),
        (
            YarnRopeScaling(kind="yarn", factor=8.0, original_length=24),
            "original_length=24 is not what it was trained for; that would be 48",
        ),
        (YarnRopeScaling(kind="yarn", factor=4.0, original_length=48), ""),
        (
            AdaptiveRopeScaling(kind="adaptive", factor=2.0, original_length=48),
            "original_length=48 is not what it was trained for; that would be 96",
        ),
        (AdaptiveRopeScaling(kind="adaptive", factor=2.0, original_length=96), ""),
        (NoRopeScaling(kind="none"), ""),
    ],
)
def test_a_scaling_made_for_a_model_of_another_length_is_said(rope, said, source, text, capsys):
    config = recipe(text, "unused", source)
    model = dataclasses.replace(MODEL, max_length=192, rope=rope)
    open_initial(dataclasses.replace(config, model=model))
    found = capsys.readouterr().err
    assert f"model.rope.{said}\n" in found if said else "trained for" not in found


def test_meta_folders_may_have_another_rope_and_epsilon_too(tmp_path, text, capsys):
    shutil.copytree(FIXTURES / "meta-llama3", tmp_path / "meta")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    file = ["tokenizer.kind=file", "tokenizer.path=none"]
    config = recipes.load(text, [f"training.init_from={tmp_path / 'meta'}", *file])
    there = open_model(find(FIXTURES / "hf-llama3")).config
    wanted = dataclasses.replace(there, rope_theta=1e6, rms_norm_eps=1e-4)
    stored = open_initial(dataclasses.replace(config, model=wanted))
    assert stored.config.rope_theta == params["rope_theta"]
    assert stored.config.rms_norm_eps == params["norm_eps"]
    said = capsys.readouterr().err
    assert f"model.rope_theta is 1000000.0, there {params['rope_theta']}" in said
    assert f"model.rms_norm_eps is 0.0001, there {params['norm_eps']}" in said
    with pytest.raises(UserError, match="ffn_dim is"):
        wider = dataclasses.replace(wanted, ffn_dim=2 * wanted.ffn_dim)
        open_initial(dataclasses.replace(config, model=wider))


@pytest.mark.parametrize("mesh", [{"fsdp": 1}, {"fsdp": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_array_larger_than_orbax_may_hold_is_read(monkeypatch, tmp_path, params, mesh, dtype):
    write_model(tmp_path / "own", MODEL, params, None)
    monkeypatch.setattr(checkpoint, "_LEAST_ROOM", 0)  # as if all arrays were large
    devices = jax.devices()[: np.prod(list(mesh.values()))]
    placement = Placement(make_mesh(MeshConfig(**mesh), devices), ShardingConfig())
    placed = llama.placed_shapes(MODEL, placement, dtype, "float32")
    got = open_model(find(tmp_path / "own")).read(placed)
    wanted = jax.tree.map(lambda x, like: x.astype(like.dtype), params, placed)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_what_a_folder_is_is_found_by_looking(source, tmp_path):
    assert find(source).format == source.name
    both = tmp_path / "both"
    shutil.copytree(source, both)
    for name in ("config.json", "config.yaml"):
        (both / name).touch()
    with pytest.raises(UserError, match="may be jllama or hf; convert the one that you mean"):
        open_model(find(both))
    with pytest.raises(
        UserError, match=r"neither a model nor an adapter.*; expected a run or a model"
    ):
        open_model(find(tmp_path))
