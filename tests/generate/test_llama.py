"""The public door, and sample.py, on a run folder with fresh weights."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import jllama
from jllama.config import MeshConfig, TrainedTokenizer
from jllama.config import recipe as recipes
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.store.checkpoint import Checkpoints
from jllama.text.vocabulary import train_sentencepiece
from jllama.train.state import define_state, init_state

ROOT = Path(__file__).parent.parent.parent
STEPS = (3, 7)


@pytest.fixture(scope="module")
def recipe():
    # More rows in the model's vocabulary than the tokenizer has; and a mesh that is not here.
    model = dataclasses.replace(tiny.config(vocab_size=448, num_layers=2), max_length=96)
    path = recipes.configs_folder() / "train" / "tiny.yaml"
    recipe = recipes.load(path, ["data.length=64", "sample.max_new_tokens=0"])
    tokenizer = TrainedTokenizer(kind="train", vocab_size=400)
    mesh = MeshConfig(fsdp=64, tensor=64)
    return dataclasses.replace(recipe, model=model, tokenizer=tokenizer, mesh=mesh)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(recipes.to_yaml(recipe))
    text = Path(__file__).read_text()
    train_sentencepiece([text], recipe.tokenizer).save(folder)
    placement = Placement(make_mesh(MeshConfig(), jax.devices()[:1]), recipe.sharding)
    definition = define_state(recipe, placement)
    checkpoints = Checkpoints(folder, keep=2)
    for step in STEPS:
        state = init_state(definition, step)
        # A padding row of the head is by far the loudest.
        head = state.trainable["head"]["weight"].at[430:].multiply(100.0)
        checkpoints.save(step, trainable={**state.trainable, "head": {"weight": head}})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def model(run):
    return jllama.load(run)


def test_a_run_folder_is_its_newest_step(run, model):
    newest = jllama.load(run / "checkpoints" / "7")
    older = jllama.load(run / "checkpoints" / "3")
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(newest.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (model.params["embedding"]["weight"] != older.params["embedding"]["weight"]).any()


def test_logits_are_those_of_the_model(model, recipe):
    tokens = tiny.tokens(2, 9, vocab_size=448)
    got = model.logits(tokens.tolist())
    assert got.dtype == np.float32
    assert got.shape == (2, 9, 448)
    # On one device; what was loaded may lie on several.
    params = jax.tree.map(np.asarray, model.params)
    assert tiny.relative_error(got, tiny.logits(params, recipe.model, tokens)) < 1e-6


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        3,
        [1, 2],
        ["a"],
        [[0.5]],
        [[448]],
        [[1], [2, -1]],
        [[]],
        [[1, 2], []],
        [[[1]]],
        [[1], [2, [3]]],
    ],
    ids=str,
)
def test_logits_of_what_are_no_rows_of_ids_is_an_error(model, tokens):
    with pytest.raises(jllama.UserError, match=r"^logits: "):
        model.logits(tokens)


def test_bfloat16_keeps_matrices_in_it_and_changes_no_result(run, model):
    half = jllama.load(run, dtype="bfloat16")
    assert half.params["head"]["weight"].dtype == half.params["layers"]["mlp"]["up"]["kernel"].dtype
    assert half.params["head"]["weight"].dtype == "bfloat16"
    assert half.params["final_norm"]["scale"].dtype == "float32"
    # The same computation, casting at every use.
    uncast = dataclasses.replace(half, params=model.params)
    tokens = tiny.tokens(1, 8, vocab_size=400)
    np.testing.assert_array_equal(half.logits(tokens), uncast.logits(tokens))
    assert 0 < tiny.relative_error(half.logits(tokens), model.logits(tokens)) < 0.05


def test_generate_takes_a_text_several_texts_and_ids(model):
    settings = {"max_new_tokens": 8, "temperature": 0.0}
    one = model.generate("class Config", **settings)
    ids = model.tokenizer.encode("class Config", bos=True)
    assert len(one) == 1
    assert len(one[0]) > 0
    assert model.generate(["import os", "class Config"], **settings)[1:] == one
    assert model.generate([ids], **settings) == one
    bos = [model.tokenizer.bos_id]
    assert model.generate("", **settings) == model.generate([[]], **settings)
    assert model.generate("", **settings) == model.generate([bos], **settings)


@pytest.mark.optimized
def test_samples_come_by_prompt_and_do_not_depend_on_the_batch(model):
    prompts = ["def a", "def b"]
    many = model.generate(prompts, num_samples=3, max_new_tokens=12, seed=5)
    assert len(many) == len(set(many)) == 6
    assert model.generate("def b", num_samples=2, max_new_tokens=12, seed=5) == many[3:5]
    assert model.generate(prompts, num_samples=3, max_new_tokens=12, seed=5, batch_size=4) == many
    assert model.generate(prompts, num_samples=3, max_new_tokens=12, seed=6) != many


def test_stream_is_generate_piece_by_piece(model):
    many = model.generate("x = 'é", num_samples=2, max_new_tokens=40, seed=1)
    for number, text in enumerate(many):
        pieces = list(model.stream("x = 'é", sample=number, max_new_tokens=40, seed=1))
        assert len(pieces) > 20
        assert "".join(pieces) == text


def test_complete_says_what_generate_wrote_and_why_it_ended(model):
    settings = {"max_new_tokens": 12, "seed": 1}
    texts = model.generate(["def a", "b"], num_samples=2, **settings)
    completions = model.complete(["def a", "b"], num_samples=2, **settings)
    assert [completion.text for completion in completions] == texts
    for completion in completions:
        assert completion.finish_reason == "length"
        assert len(completion.ids) == len(completion.logprobs) == 12
        assert all(logprob <= 0 for logprob in completion.logprobs)
    stop = texts[0][3:5]
    (cut,) = model.complete("def a", stop=["never", stop], **settings)
    pieces = list(model.stream("def a", stop=stop, **settings))
    assert cut.text == "".join(pieces) == texts[0].partition(stop)[0]
    assert cut.finish_reason == "stop"
    assert cut.ids == completions[0].ids[: len(cut.ids)]
    assert cut.logprobs == pytest.approx(completions[0].logprobs[: len(cut.ids)], abs=1e-4)
    assert len(pieces) < 12  # it is no longer written


def test_an_end_token_is_a_stop_and_no_part_of_the_completion(model):
    (free,) = model.complete("def a", max_new_tokens=12, temperature=0.0)
    at = next(i for i in range(1, 12) if free.ids[i] not in free.ids[:i])
    head = model.params["head"]["weight"]
    rows = np.array([free.ids[at], model.tokenizer.eos_id])
    params = {**model.params, "head": {"weight": head.at[rows[::-1]].set(head[rows])}}
    ending = dataclasses.replace(model, params=params)
    (got,) = ending.complete("def a", max_new_tokens=12, temperature=0.0)
    assert (got.ids, got.finish_reason) == (free.ids[:at], "stop")
    assert len(got.logprobs) == at


def test_the_default_number_of_new_tokens_fits_the_model(model):
    # Ids beyond the tokenizer's are the likeliest here and never drawn.
    ids = model.tokenizer.encode("def f(x):", bos=True)
    pieces = list(model.stream("def f(x):", temperature=0.0))
    assert len(pieces) == 96 - len(ids) + 1  # with the end


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 1000}, "exceed the model's max_length=96"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line(model, settings, said):
    with pytest.raises(jllama.UserError, match=said):
        model.generate("x", **settings)


def test_a_prompt_without_room_for_one_token_is_an_error(run, model):
    with pytest.raises(jllama.UserError, match=r"96 tokens and 1 new .*\(--max-length\)"):
        model.stream([5] * 96)
    longer = jllama.load(run, max_length=97)
    assert longer.complete([[5] * 96], max_new_tokens=1)[0].finish_reason == "length"


def test_what_is_no_model_is_an_error_that_says_what_is(run, tmp_path):
    for path in (tmp_path, tmp_path / "absent", run / "config.yaml", run / "checkpoints"):
        with pytest.raises(jllama.UserError, match="expected a run or a model"):
            jllama.load(path)
    with pytest.raises(jllama.UserError, match="no step 5; there are: 3, 7"):
        jllama.load(run / "checkpoints" / "5")
    with pytest.raises(jllama.UserError, match="dtype='float16'"):
        jllama.load(run, dtype="float16")
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(jllama.UserError, match="no checkpoint"):
        jllama.load(tmp_path)


def sample(run, *args):
    command = [sys.executable, "sample.py", "--model", str(run), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_sample_prints_the_continuations_and_nothing_else(run, model):
    args = "--max-new-tokens 12 --num-samples 2 --seed 4 --temperature 0.9 --top-k 50 --top-p 0.9"
    got = sample(run, "--prompt", "def f", *args.split())
    settings = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 4, "max_new_tokens": 12}
    first, second = model.generate("def f", num_samples=2, **settings)
    assert (got.returncode, got.stdout, got.stderr) == (0, f"{first}\n{second}\n", "---\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--top-k", "many"], "--top-k: invalid int value"),
        (["--max-new-tokens", "5000"], "max_length=96"),
    ],
    ids=str,
)
def test_sample_says_bad_input_in_one_line(run, args, said):
    got = sample(run, *args)
    assert (got.returncode, got.stdout) == (2, "")
    assert said in got.stderr
    assert got.stderr.count("\n") == 1


def test_sample_streams_and_ends_quietly_when_interrupted(run):
    command = [sys.executable, "sample.py", "--model", str(run), "--num-samples", "100000"]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, cwd=ROOT)
    assert process.stdout.read(1)  # came long before the end
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr


def test_sample_ends_quietly_when_its_reader_goes_away(run):
    command = [sys.executable, "sample.py", "--model", str(run), "--num-samples", "100000"]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, cwd=ROOT)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
