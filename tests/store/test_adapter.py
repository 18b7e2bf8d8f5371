"""Adapters from end to end: trained over a model, kept, loaded, mixed, worked in, converted."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes
import tiny

import jllama
from jllama import cli
from jllama.adapt import lora
from jllama.config import MeshConfig
from jllama.config import recipe as configs
from jllama.errors import UserError
from jllama.interop import hf
from jllama.model.param import map_leaves
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.store.find import find
from jllama.store.fingerprint import fingerprint
from jllama.store.model import open_model, read_base
from jllama.train.loop import train
from jllama.train.state import base_quantizer, base_shapes, define_state, init_state, load_state

TOKENS = tiny.tokens(2, 20, vocab_size=300)
FASTER = "training.schedule.peak=0.03"
STILL = "training.schedule.peak=1e-30"  # a run that changes nothing shows what it began from


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained run; its recipe lies beside it."""
    path = recipes.on_disk(tmp_path_factory.mktemp("base"))
    return train(configs.load(path)).folder


@pytest.fixture(scope="module")
def adapted(base):
    """Trains an adapter over the run: name, overrides -> its folder."""

    def run(name, *overrides):
        return train(recipe(base, f"run.name={name}", *overrides)).folder

    return run


def recipe(base, *overrides):
    return configs.load(
        base.parent.parent / "recipe.yaml",
        ["adapt={kind: lora, rank: 4, alpha: 8}", f"training.init_from={base}", FASTER, *overrides],
    )


@pytest.fixture(scope="module")
def one(adapted):
    return adapted("one")


@pytest.fixture(scope="module")
def other(adapted):
    return adapted(
        "other", "adapt.dora=true", "adapt.targets=[q,v,down]", "adapt.rank=2", "run.seed=5"
    )


def logits(*args, **kwargs):
    return np.asarray(jllama.load(*args, **kwargs).logits(TOKENS))


def digest(folder):
    """Of the state at the end."""
    config = configs.load(folder / "config.yaml")
    placement = Placement(make_mesh(config.mesh), config.sharding)
    return fingerprint(load_state(folder, 10, define_state(config, placement)))


def size(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_a_run_is_its_base_with_the_overlay_on_top(base, one):
    model = jllama.load(one)
    assert model.adapters == ("one",)
    off = tiny.relative_error(model.logits(TOKENS), logits(base))
    assert off > 1e-2
    np.testing.assert_array_equal(model.logits(TOKENS, adapter={}), logits(base))
    np.testing.assert_array_equal(model.logits(TOKENS), logits(base, adapter=one))
    said = json.loads((one / "base.json").read_text())
    assert said["model"] == str(base / "checkpoints" / "10") and len(said["fingerprint"]) == 64


def test_a_checkpoint_holds_the_overlay_and_its_optimizer_alone(one):
    config = configs.load(one / "config.yaml")
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), config.sharding)
    state = load_state(one, 10, define_state(config, placement))
    m, R = config.model, 4
    D, H, K, F = m.hidden_dim, m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim, m.ffn_dim
    count = m.num_layers * R * (2 * (D + H) + 2 * (D + K) + 3 * (D + F))
    assert sum(x.nbytes for x in jax.tree.leaves(state.trainable)) == 4 * count
    assert 0 <= sum(x.nbytes for x in jax.tree.leaves(state.opt_state)) - 8 * count < 100
    for item in ("trainable", "rest"):
        said = json.loads((one / "checkpoints" / "10" / item / "_METADATA").read_text())
        keys = [[k["key"] for k in leaf["key_metadata"]] for leaf in said["tree_metadata"].values()]
        arrays = [path for path in keys if len(path) > 3]
        assert len(arrays) == 14 * {"trainable": 1, "rest": 2}[item]
        assert {path[-1] for path in arrays} == {"a", "b"}
        assert not {"embedding", "head", "kernel"} & {key for path in keys for key in path}


@pytest.mark.optimized
def test_it_resumes_bit_for_bit(base, one):
    stopped = train(recipe(base, "run.name=again", "run.stop_after=6"))
    assert stopped.steps == 6
    again = train(recipe(base, "run.name=again"))
    assert again.done and digest(again.folder) == digest(one)


def test_the_base_is_checked_by_shape_and_by_value(base, one, tmp_path):
    wider = recipes.on_disk(tmp_path / "wider", ffn_dim=96)
    wider = train(configs.load(wider, ["training.steps=2"])).folder
    with pytest.raises(UserError, match=r"another model.*model\.ffn_dim is 96, there 80"):
        jllama.load(wider, adapter=one)
    with pytest.raises(UserError, match="was trained over other parameters than these") as e:
        jllama.load(base / "checkpoints" / "8", adapter=one)
    jllama.load(re.search(r"over (\S+) as it was then; give that", str(e.value))[1], adapter=one)
    # What lies under the path is not what it was.
    runs = tmp_path / "runs"
    shutil.copytree(base, runs / "base")
    options = (f"training.init_from={runs / 'base'}", f"run.folder={runs}", "run.name=x")
    train(recipe(base, *options, "run.stop_after=4"))
    (runs / "base" / "checkpoints" / "10").rename(tmp_path / "10")
    with pytest.raises(UserError, match=r"are not those that the run in .* began with") as e:
        train(recipe(base, *options))
    assert "; bring them back, or choose another run.name" in str(e.value)
    short = ("run.stop_after=1", "run.name=y")
    assert train(recipe(base, *options, *short)).steps == 1
    (tmp_path / "10").rename(runs / "base" / "checkpoints" / "10")
    assert train(recipe(base, *options)).done


def test_an_overlay_without_a_base_is_one_line(base):
    with pytest.raises(UserError, match=r"adapt\.kind=lora: .*training\.init_from"):
        recipe(base, "training.init_from=")
    with pytest.raises(UserError, match=r"adapt\.targets: 'w1' matches nothing"):
        train(recipe(base, "run.name=w1", "adapt.targets=[w1]"))
    with pytest.raises(UserError, match=r"a model and no adapter; expected a run with adapt\.kind"):
        jllama.load(base, adapter=base)
    with pytest.raises(UserError, match=r"nowhere: no such folder; .*adapter_config\.json"):
        jllama.load(base, adapter="nowhere")


def test_several_are_named_and_chosen_by_request(base, one, other):
    model = jllama.load(base, adapter={"a": one, "b": other})
    assert model.adapters == ("a", "b")
    np.testing.assert_array_equal(model.logits(TOKENS), logits(base))  # of several, none
    assert tiny.relative_error(model.logits(TOKENS, adapter="a"), logits(one)) < 1e-5
    assert tiny.relative_error(model.logits(TOKENS, adapter="b"), logits(other)) < 1e-5
    how = {"max_new_tokens": 12, "temperature": 0.0}
    alone = [
        jllama.load(base).generate("def", **how)[0],
        jllama.load(one).generate("def", **how)[0],
        jllama.load(other).generate("def", **how)[0],
    ]
    assert len(set(alone)) == 3
    got = model.generate(["def"] * 4, adapter=[None, "a", "b", {"a": 1.0}], **how)
    assert got == [*alone, alone[1]]
    assert "".join(model.stream("def", adapter="b", **how)) == alone[2]
    with pytest.raises(UserError, match="beside other adapters it is one of --adapter, over its"):
        jllama.load(one, adapter=other)
    with pytest.raises(UserError, match=r"no 'c' was loaded; .*: a, b"):
        model.logits(TOKENS, adapter="c")
    with pytest.raises(UserError, match="2 of them for 1 prompts"):
        model.generate("x", adapter=["a", "b"])


def test_switching_compiles_nothing(base, one, other):
    model = jllama.load(base, adapter={"a": one, "b": other})
    how = {"max_new_tokens": 4, "temperature": 0.0}
    model.generate("def", adapter="a", **how)
    jllama.generate.engine.traces.clear()
    model.generate("def", adapter="b", **how)
    model.generate("def", adapter={"a": 0.3, "b": 0.7}, **how)
    assert not jllama.generate.engine.traces


@pytest.mark.parametrize(
    "more", [("adapt.full=[embedding,head,'*norm']",), ("adapt.quantize=nf4",)]
)
def test_worked_in_it_gives_the_same_logits(base, adapted, tmp_path, capsys, more):
    run = adapted(f"merged{len(more[0])}", *more)
    target = tmp_path / "merged"
    assert (
        cli.main(["convert", str(base), str(target), "--adapter", str(run), "--to", "jllama"]) == 0
    )
    said = capsys.readouterr().err
    change = float(re.search(r"its matrices changed by ([\d.e-]+) of themselves", said)[1])
    assert 0.01 < change < 1 and "rounded to float32, they are off by 0\n" in said
    assert tiny.relative_error(logits(target), logits(run)) < 1e-5
    hf = tmp_path / "hf"
    assert (
        cli.main(["convert", str(base), str(hf), "--adapter", str(run), "--dtype", "bfloat16"]) == 0
    )
    assert "rounded to bfloat16, they are off by 0.001" in capsys.readouterr().err
    for kind, rounding in (
        ("BF16", "rounded to bfloat16, they are off by 0.001"),
        ("Q8_0", "rounded to float32, they are off by 0, before it is written as Q8_0"),
    ):
        command = ["convert", str(base), str(tmp_path / f"{kind}.gguf"), "--dtype", kind]
        assert cli.main([*command, "--adapter", str(run)]) == 0
        assert rounding in capsys.readouterr().err
    assert tiny.relative_error(logits(hf, dtype="float32"), logits(run)) < 0.1


def test_to_peft_and_back(base, other, tmp_path, capsys):
    there, back = tmp_path / "peft", tmp_path / "back"
    capsys.readouterr()
    assert cli.main(["convert", str(other), str(there)]) == 0
    assert f"note: PEFT opens no base of jllama's, such as {base}" in capsys.readouterr().err
    hf, named = tmp_path / "hf", tmp_path / "named"
    assert cli.main(["convert", str(base), str(hf), "--to", "hf"]) == 0
    assert cli.main(["convert", str(other), str(named), "--base-name", str(hf)]) == 0
    assert "PEFT opens no base" not in capsys.readouterr().err
    np.testing.assert_array_equal(logits(named), logits(other))
    assert cli.main(["convert", str(there), str(back)]) == 0
    wanted = logits(other)
    for folder in (there, back):  # which say where their base is
        np.testing.assert_array_equal(logits(folder), wanted)
        np.testing.assert_array_equal(logits(base, adapter=folder), wanted)
    capsys.readouterr()
    assert cli.main(["convert", str(other), str(tmp_path / "x"), "--to", "hf"]) == 2
    assert "its base: jllama convert BASE DST --adapter" in capsys.readouterr().err
    assert cli.main(["convert", str(base), str(tmp_path / "x"), "--to", "peft"]) == 2
    assert not (tmp_path / "x").exists()


def test_sample_takes_adapters_with_weights(base, one):
    def sample(*args):
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, root / "sample.py", "--prompt=def", "--max-new-tokens=8",
             "--temperature=0", *map(str, args)],
            capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    how = {"max_new_tokens": 8, "temperature": 0.0}
    assert (
        sample("--model", base, "--adapter", one)[1] == jllama.load(one).generate("def", **how)[0]
    )
    assert sample("--model", one)[1] == jllama.load(one).generate("def", **how)[0]
    without = jllama.load(base).generate("def", **how)[0]
    assert sample("--model", base, "--adapter", f"{one}=0")[1] == without
    status, _, error = sample("--model", base, "--adapter", f"{one}=much")
    assert status == 2 and error.count("\n") == 1 and "'much' is not a number" in error


def test_a_quantised_base_is_loaded_as_it_was_trained_over(base, adapted, one):
    run = adapted("int8", "adapt.quantize=int8")
    model = jllama.load(run)
    kernel = model.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.qvalue.dtype == np.int8
    assert 1e-4 < tiny.relative_error(model.logits(TOKENS, adapter={}), logits(base)) < 0.2
    with pytest.raises(
        UserError, match="trained over bases kept in int8 and none; load them apart"
    ):
        jllama.load(base, adapter={"a": run, "b": one})


def test_a_base_that_lies_elsewhere_is_the_same_base(base, tmp_path):
    options = (f"run.folder={tmp_path}", "run.name=x")
    train(recipe(base, *options, "run.stop_after=4"))
    shutil.copytree(base, tmp_path / "moved")
    assert train(recipe(base, *options, f"training.init_from={tmp_path / 'moved'}")).done


def test_a_run_without_a_checkpoint_may_begin_over_another_base(base, tmp_path):
    run = tmp_path / "x"
    run.mkdir()
    (run / "base.json").write_text('{"model": "gone", "fingerprint": "0"}')
    assert train(recipe(base, f"run.folder={tmp_path}", "run.name=x", "training.steps=2")).done


def test_the_model_is_as_the_adapter_was_trained_over_it(base, adapted, one, tmp_path, capsys):
    """RoPE, length, padding and tokenizer."""
    rope = "model.rope={kind: linear, factor: 2.0}"
    run = adapted(
        "longer", rope, "model.max_length=96", "model.vocab_multiple=64", "adapt.full=[head]"
    )
    model = jllama.load(run)
    assert (model.config.max_length, model.config.rope.kind) == (96, "linear")
    assert model.params["head"]["weight"].shape == (320, 48)
    target = tmp_path / "merged"
    assert (
        cli.main(["convert", str(base), str(target), "--adapter", str(run), "--to", "jllama"]) == 0
    )
    merged = jllama.load(target)
    assert merged.config.rope == model.config.rope and merged.config.max_length == 96
    assert tiny.relative_error(merged.logits(TOKENS), model.logits(TOKENS)) < 1e-5
    assert merged.tokenizer.digest == model.tokenizer.digest
    with pytest.raises(UserError, match=r"trained over several of model\.rope"):
        jllama.load(base, adapter={"a": run, "b": one})
    assert cli.main(["convert", str(run), str(tmp_path / "peft")]) == 0
    assert "another model.rope than its base" in capsys.readouterr().err
    assert (tmp_path / "peft" / "tokenizer.model").exists()


def test_what_is_whole_cannot_be_weighed(base, adapted, one):
    model = jllama.load(adapted("whole", "adapt.full=[head]"))
    for mixture in ({}, {"whole": 0.5}):
        with pytest.raises(UserError, match=r"adapter whole: holds head\.weight whole, and so has"):
            model.logits(TOKENS, adapter=mixture)
    with pytest.raises(UserError, match=r"whole: holds head\.weight whole, .*; load this .* alone"):
        jllama.load(base, adapter={"whole": base.parent / "whole", "one": one})
    np.testing.assert_array_equal(
        jllama.load(base, adapter=base.parent / "whole").logits(TOKENS), model.logits(TOKENS)
    )
    for mixture in ({"whole": "x"}, 0.5, ["whole"]):
        with pytest.raises(UserError, match=r"expected the name of .* or weights by name"):
            model.logits(TOKENS, adapter=mixture)
    with pytest.raises(UserError, match="not all finite"):
        model.logits(TOKENS, adapter={"whole": float("nan")})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_is_quantised_alike_whatever_it_is_read_in(base, adapted, dtype):
    run = adapted(f"nf4-{dtype}", "adapt.quantize=nf4", f"compute.dtype={dtype}")
    config = configs.load(run / "config.yaml")
    stored = open_model(find(base))
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), config.sharding)
    trained = map_leaves(stored.read(base_shapes(config, placement)), base_quantizer(config))
    for wanted in (None, "float32", "bfloat16"):
        model = jllama.load(run, dtype=wanted)
        assert model.compute.dtype == (wanted or dtype)
        for name in ("qvalue", "scale"):
            a, b = (
                getattr(p["layers"]["mlp"]["up"]["kernel"], name) for p in (model.params, trained)
            )
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_a_whole_matrix_begins_as_the_base_over_a_quantised_one_too(base):
    config = recipe(base, "adapt.quantize=nf4", "adapt.targets=[q]", "adapt.full=[down]")
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), config.sharding)
    params = open_model(find(base)).read(base_shapes(config, placement))
    down = np.asarray(params["layers"]["mlp"]["down"]["kernel"])
    state = init_state(
        define_state(config, placement), 0, map_leaves(params, base_quantizer(config))
    )
    np.testing.assert_array_equal(state.trainable["layers"]["mlp"]["down"]["kernel"], down)


@pytest.mark.parametrize("format", ["jllama", "hf"])
def test_one_matrix_at_a_time_is_read_and_quantised(base, tmp_path, format):
    config = recipe(base, "adapt.quantize=int8")
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), config.sharding)
    places = base_shapes(config, placement)
    stored = open_model(find(base))
    if format == "hf":
        params = stored.read(places)
        hf.write_folder(tmp_path / "hf", stored.config, params, stored.tokenizer)
        stored = open_model(find(tmp_path / "hf"))
        del params
    there = {id(x) for x in jax.live_arrays()}
    least = min(x.nbytes for x in jax.tree.leaves(stored.read(places)["layers"]["mlp"]))
    most, freeze = [], base_quantizer(config)

    def keep(path, x):
        whole = [y for y in jax.live_arrays() if id(y) not in there and y.ndim > 2]
        most.append(sum(y.nbytes >= least for y in whole))
        return freeze(path, x)

    params, digest = read_base(stored, places, keep)
    assert max(most) == 1
    assert digest == fingerprint(stored.read(places), "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params, map_leaves(stored.read(places), freeze))


def test_an_adapter_is_evaluated_with_its_base(base, one, tmp_path, capsys):
    words = ("--data", str(base), "--lengths", "8,16", "--stride", "4", "--join")
    for out, model in (("one", one), ("base", base)):
        out = str(tmp_path / out)
        assert (
            cli.main(["evaluate", "perplexity", "--model", str(model), *words, "--out", out]) == 0
        )
    tables = [(tmp_path / name / "perplexity.csv").read_text() for name in ("one", "base")]
    assert tables[0] != tables[1]


def test_perplexity_takes_adapters_of_the_model_before_them(base, one, other, tmp_path, capsys):
    words = ("--data", str(base), "--lengths", "8,16", "--stride", "4", "--join")

    def run(*args):
        given = ["evaluate", "perplexity", *map(str, args), *words, "--out", str(tmp_path / "out")]
        status = cli.main(given)
        out, err = capsys.readouterr()
        return status, [line.split() for line in out.splitlines()], err

    status, rows, err = run(
        "--model", f"base={base}", "--model", f"with={base}", "--adapter", one,
        "--model", f"off={base}", "--adapter", f"{one}=0", "--adapter", f"{other}=0",
        "--model", f"both={base}", "--adapter", f"{one}=0.5", "--adapter", other,
        "--model", f"alone={one}",
    )  # fmt: skip
    assert status == 0, err
    found = {name: figures for name, *figures in rows[1:-2]}
    assert found["with"] == found["alone"] != found["base"] == found["off"]
    assert found["both"] not in (found["base"], found["alone"])
    for args, said in (
        (("--adapter", one, "--model", base), "must come after the --model that it is for"),
        (("--model", base, "--adapter", f"{one}=much"), "'much' is not a number"),
        (("--model", base, "--adapter", one, "--adapter", f"{one}=0"), "is given twice"),
        (("--model", base, "--adapter", base), "a model and no adapter"),
    ):
        status, _, error = run(*args)
        assert status == 2 and said in error.splitlines()[-1]


def test_infilling_takes_adapters(base, one, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(recipes.texts(3, 5)))
    words = ("--data", str(tmp_path / "*.txt"), "--ways=prefix", "--count=6", "--json",
             "--max-new-tokens=8", "--length=40")  # fmt: skip

    def run(*args):
        out = tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        assert cli.main(["evaluate", "infill", *map(str, args), *words, "--out", str(out)]) == 0
        said = json.loads(capsys.readouterr().out)
        return said["adapters"], [json.loads(x)["prefix"] for x in out.read_text().splitlines()]

    with_one = run("--model", base, "--adapter", one)
    assert with_one == ({str(one): 1.0}, run("--model", one)[1])
    without = run("--model", base)
    assert without[0] == {} and without[1] != with_one[1]
    assert run("--model", base, "--adapter", f"{one}=0")[1] == without[1]


def test_a_folder_named_by_a_number_is_one_like_any_other(base, tmp_path):
    folder = tmp_path / "13"
    assert cli.main(["convert", str(base), str(folder)]) == 0
    np.testing.assert_array_equal(logits(folder), logits(base))


def test_an_adapter_is_no_gguf_and_an_empty_name_no_adapter(base, one, tmp_path, capsys):
    assert cli.main(["convert", str(one), str(tmp_path / "x.gguf")]) == 2
    assert cli.main(["convert", str(base), str(tmp_path / "x"), "--adapter", ""]) == 2
    capsys.readouterr()
    for more in ([f"{one}=0.5"], [str(one), "--adapter", str(base)]):
        assert cli.main(["convert", str(base), str(tmp_path / "x"), "--adapter", *more]) == 2
        assert "--adapter: give one, with weight 1" in capsys.readouterr().err
    for words, said in (
        ((base, "x"), "is a model"),
        ((one, "x", "--to", "jllama"), "leave it out"),
    ):
        convert = ["convert", str(words[0]), str(tmp_path / "x"), *words[2:], "--base-name", "n"]
        assert cli.main(convert) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_two_adapters_are_merged_one_after_the_other(base, adapted, one, tmp_path, capsys):
    two = adapted("two", "run.seed=7", "adapt.rank=2")
    merged, peft, both = (str(tmp_path / name) for name in ("merged", "peft", "both"))
    command = ["convert", str(base), merged, "--to", "jllama", "--adapter", str(one)]
    assert cli.main([*command, "--adapter", str(two)]) == 2
    assert "as PEFT's (jllama convert NEXT DST --to peft)" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert cli.main(["convert", str(two), peft, "--to", "peft"]) == 0
    assert cli.main(["convert", merged, both, "--to", "jllama", "--adapter", peft]) == 0
    model = jllama.load(base, adapter={"one": one, "two": two})
    wanted = model.logits(TOKENS, adapter={"one": 1.0, "two": 1.0})
    assert tiny.relative_error(logits(both), wanted) < 1e-5


def test_an_adapter_is_trained_on_and_the_run_resumes_without_it(base, adapted, one, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(one, moved)
    further = adapted("further", f"training.init_from={moved}")
    assert (further / "base.json").read_text() == (one / "base.json").read_text()
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open() if '"loss"' in line]
        for run in (one, further)
    ]
    assert losses[1][0] < losses[0][0] - 0.05
    assert tiny.relative_error(logits(further), logits(one)) > 1e-3
    adapted("again-further", f"training.init_from={moved}", "run.stop_after=6")
    shutil.rmtree(moved)  # the checkpoint has what was taken from it
    with pytest.raises(UserError, match="moved: no such folder"):
        adapted("again-further", f"training.init_from={moved}")
    assert digest(adapted("again-further", f"training.init_from={base}")) == digest(further)


def test_every_kind_of_adapter_is_trained_on(adapted):
    kind = (
        "adapt.dora=true", "adapt.full=[head,'*norm']", "adapt.targets=[q,up]",
        "adapt.overrides=[{match: q, rank: 2, layers: [1]}]", "adapt.quantize=nf4",
        "compute.param_dtype=bfloat16", "training.steps=2",
    )  # fmt: skip
    first = adapted("kind", *kind)
    again = adapted("kind-still", *kind, f"training.init_from={first}", STILL)
    np.testing.assert_array_equal(logits(again), logits(first))


def test_pefts_adapters_are_trained_on(base, adapted, other, tmp_path):
    peft = tmp_path / "peft"
    assert cli.main(["convert", str(other), str(peft), "--base-name", "somebody/else"]) == 0
    said = json.loads((peft / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "somebody/else"
    alike = (
        "adapt.dora=true", "adapt.targets=[q,v,down]", "adapt.rank=2", STILL, "training.steps=2",
    )  # fmt: skip
    on = f"training.init_from={peft}"
    with pytest.raises(UserError, match=r"adapter of somebody/else.* adapt\.base in a recipe"):
        adapted("of-peft", *alike, on)
    run = adapted("of-peft", *alike, on, f"adapt.base={base}")
    np.testing.assert_array_equal(logits(run), logits(other))
    # The other ways that the message names.
    with pytest.raises(UserError, match=r"say where that is \(load\(BASE, adapter="):
        jllama.load(peft)
    np.testing.assert_array_equal(logits(base, adapter=peft), logits(other))
    convert = ["convert", str(peft), str(tmp_path / "ours")]
    assert cli.main(convert) == 2
    assert cli.main([*convert, "--base", str(base)]) == 0
    np.testing.assert_array_equal(logits(tmp_path / "ours"), logits(other))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("adapt.rank=8",), r"k has rank 4, alpha 8 there, has rank 8, alpha 8 here; say the same"),
        (("adapt.alpha=4",), r"k has rank 4, alpha 8 there, has rank 4, alpha 4 here"),
        (("adapt.targets=[q]",), r"k has rank 4, alpha 8 there, is frozen here"),
        (("adapt.full=[head]",), r"head\.weight is frozen there, is trained whole here"),
        (("adapt.dora=true",), r"alpha 8 there, has rank 4, alpha 8, dora here"),
        (("adapt.kind=none",), r"adapt\.kind=lora trains it on; to train all parameters, begin"),
        (("model.num_layers=1",), r"its parameters are not the recipe's model: model\.num_layers"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_an_adapter_that_is_another_than_the_recipe_says_is_one_line(base, one, more, said):
    wanted = configs.load(
        base.parent.parent / "recipe.yaml",
        [f"training.init_from={one}", "run.name=refused", *more]
        if more == ("adapt.kind=none",)
        else ["adapt={kind: lora, rank: 4, alpha: 8}", f"training.init_from={one}",
              "run.name=refused", *more],
    )  # fmt: skip
    with pytest.raises(UserError, match=said):
        train(wanted)
    assert not (base.parent / "refused" / "checkpoints").exists()


def test_what_info_says_of_an_adapter_trains_it_on(base, other, capsys):
    on = (f"training.init_from={other}", "run.name=by-info", "training.steps=2", STILL)
    with pytest.raises(UserError, match=r"; say the same \(jllama info \S+\)") as e:
        train(recipe(base, *on))
    capsys.readouterr()
    command = re.search(r"say the same \(jllama (.*)\)", str(e.value))[1]
    assert cli.main([*command.split(), "--json"]) == 0
    adapt = json.loads(capsys.readouterr().out)["adapt"]
    run = train(recipe(base, *on, f"adapt={json.dumps(adapt)}")).folder
    np.testing.assert_array_equal(logits(run), logits(other))


def test_all_parameters_are_trained_from_what_an_adapter_is_merged_into(base, one, tmp_path):
    def wanted(model):
        more = (f"training.init_from={model}", "run.name=all", STILL, "training.steps=2")
        return configs.load(base.parent.parent / "recipe.yaml", more)

    with pytest.raises(UserError, match=r"begin from what `jllama .*` makes") as e:
        train(wanted(one))
    command = re.search(r"`jllama (.*)`", str(e.value))[1].split()
    merged = tmp_path / "merged"
    assert cli.main([{"BASE": str(base), "DST": str(merged)}.get(w, w) for w in command]) == 0
    run = train(wanted(merged)).folder
    assert tiny.relative_error(logits(run), logits(one)) < 1e-5


def test_an_adapter_is_trained_on_over_its_own_base_alone(base, one):
    on = ("run.name=refused2", f"training.init_from={one}")
    with pytest.raises(UserError, match="was trained over other parameters than these"):
        train(recipe(base, *on, f"adapt.base={base / 'checkpoints' / '8'}"))
    with pytest.raises(UserError, match=r"is no adapter, and adapt\.base is for one"):
        train(recipe(base, f"adapt.base={base}"))
    with pytest.raises(UserError, match=r"model\.vocab_multiple is 64, there 1"):
        train(recipe(base, *on, "model.vocab_multiple=64"))


def test_info_counts_the_overlay_and_not_full_training(base, adapted, one, other, tmp_path, capsys):
    def info(*args):
        status = cli.main(["info", *map(str, args)])
        out, err = capsys.readouterr()
        return status, out, err

    model = configs.load(base / "config.yaml").model
    overlay = configs.load(one / "config.yaml").adapt
    status, out, err = info(one)
    assert status == 0, err
    assert f"adapter over                        {base / 'checkpoints' / '10'}\n" in out
    assert "trained over them                   6,144 (8.48%)\n" in out
    assert "rank 4, alpha 8 " in out and "layers.attention.k, layers.attention.o" in out
    figures = json.loads(info(one, "--json")[1])
    assert figures["parameters"] == json.loads(info(base, "--json")[1])["parameters"]
    assert figures["train_flops_per_token"] == lora.adapted_flops_per_token(model, overlay, 24)
    assert figures["adapt"]["rank"] == 4 and figures["length"] == 24
    # As exported, to PEFT's format and ours; which has no rows of its own.
    there, ours = tmp_path / "peft", tmp_path / "ours"
    for target, more in ((there, ()), (ours, ("--to", "jllama"))):
        assert cli.main(["convert", str(other), str(target), *more]) == 0
        capsys.readouterr()
    wanted = json.loads(info(other, "--json", "--length", "48")[1])
    for folder, *more in ((there,), (ours,), (other / "checkpoints" / "10", "--length", "48")):
        figures = json.loads(info(folder, "--json", *more)[1])
        same = ("parameters", "trained_parameters", "train_flops_per_token", "adapted", "base")
        assert {key: figures[key] for key in same} == {key: wanted[key] for key in same}
    said = json.loads((there / "adapter_config.json").read_text())
    text = json.dumps(said | {"base_model_name_or_path": "somebody/else"})
    (there / "adapter_config.json").write_text(text)
    assert info(there)[0] == 2 and info(there, "--base", base)[0] == 0
    status, _, err = info(one, "--base", base)
    assert status == 2 and "--base is for an adapter of PEFT's" in err
    status, _, err = info("--base", base)  # of which adapter?
    assert status == 2 and "--base is for an adapter: give it as MODEL" in err
