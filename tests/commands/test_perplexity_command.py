"""`jllama evaluate perplexity`: several models and scalings in one table, CSV and PNG."""

import csv
import json
import math
import re
import shutil
import weakref

import matplotlib.image
import pytest

import jllama
from jllama import cli
from jllama.commands import perplexity_report
from jllama.config import recipe as recipes
from jllama.train.loop import train
from tests.recipes import on_disk


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe and two short runs of it, `a` and `b`; b's positions are interpolated."""
    folder = tmp_path_factory.mktemp("runs")
    path = on_disk(folder)
    train(recipes.load(path, ["run.name=a", "training.steps=2"]))
    longer = ["model.rope.kind=linear", "model.rope.factor=2", "model.max_length=96"]
    train(recipes.load(path, ["run.name=b", "training.steps=2", *longer]))
    return folder


@pytest.fixture
def evaluate(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)

    def run(*args, data="recipe.yaml"):
        given = ["evaluate", "perplexity", "--data", data, "--out", str(tmp_path / "out"), *args]
        status = cli.main(given)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_models_and_scalings_in_one_table_csv_and_png(evaluate, tmp_path):
    status, out, err = evaluate(
        "--model", "runs/a", "--rope", "none, {kind: ntk, alpha: 4}", "--model", "long=runs/b",
        "--lengths", "32,8,64", "--stride", "4", "--windows", "5", "--join",
    )  # fmt: skip
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["perplexity", "of", "5", "x", "4", "tokens", "8", "32", "64"]
    assert [line.split("  ")[0] for line in lines[1:4]] == ["a, none", "a, ntk alpha=4", "long"]
    assert lines[4].startswith("bits per byte of 5 x 4 tokens  ")
    assert lines[8:] == [str(tmp_path / "out" / f"perplexity.{kind}") for kind in ("csv", "png")]
    rows = list(csv.DictReader((tmp_path / "out" / "perplexity.csv").open()))
    assert len(rows) == 9
    assert {(r["stride"], r["windows"]) for r in rows} == {("4", "5")}
    found = [f"{float(r['perplexity']):.4g}" for r in rows if r["rope"] == "ntk alpha=4"]
    assert lines[2].split()[3:] == found
    bits = [f"{float(r['bits_per_byte']):.4g}" for r in rows if r["rope"] == "ntk alpha=4"]
    assert lines[6].split()[3:] == bits
    assert 5 < float(rows[0]["perplexity"]) < 400
    assert matplotlib.image.imread(tmp_path / "out" / "perplexity.png").std() > 0.01
    assert "perplexity of a" in err and "tokens" in err


def test_names_are_drawn_as_they_are_and_scalings_once(evaluate, tmp_path, monkeypatch):
    drawn, draw = [], perplexity_report._draw
    monkeypatch.setattr(perplexity_report, "_draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    given = (
        "--model",
        "$a_{$=runs/a",
        "--rope",
        "none, {kind: linear},none, linear",
        "--model",
        "_b=runs/b",
    )
    status, out, err = evaluate(*given, "--lengths", "8", "--windows", "2", "--join")
    assert status == 0, err
    (figure,) = drawn
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["$a_{$, none", "$a_{$, linear", "_b"]
    assert [line.split("  ")[0] for line in out.splitlines()[1:4]] == legend
    assert len((tmp_path / "out" / "perplexity.csv").read_text().splitlines()) == 4


def test_what_was_computed_is_kept_when_it_cannot_be_drawn(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity_report, "_draw", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate("--model", "runs/a", "--lengths", "8", "--windows", "2", "--join")
    assert (tmp_path / "out" / "perplexity.csv").exists()


def test_one_model_is_in_memory_at_a_time(evaluate, monkeypatch):
    loaded, load = [], jllama.load

    def watched(*args, **kwargs):
        assert all(model() is None for model in loaded)
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(jllama, "load", watched)
    args = ("--model", "runs/a", "--model", "runs/b", "--lengths", "8", "--windows", "2", "--join")
    assert evaluate(*args)[0] == 0
    assert len(loaded) == 2


def test_data_may_be_a_run_or_text(evaluate, folder):
    args = ("--model", "runs/a", "--lengths", "16", "--windows", "3", "--join")
    status, from_run, _ = evaluate(*args, data="runs/b")
    assert status == 0
    status, from_recipe, _ = evaluate(*args)
    assert from_run == from_recipe
    (folder / "text.txt").write_text("def f(x):\n    return x\n" * 30)
    assert evaluate("--model", "runs/a", "--lengths", "16,64", data="text.txt")[0] == 0


def test_text_of_which_nothing_is_scored_is_said(evaluate, folder):
    tokenizer = jllama.load(folder / "runs" / "a").tokenizer
    text, args = "def f(x):\n    return x\n", ("--model", "runs/a", "--stride", "1")
    length = len(tokenizer.encode(text, bos=True, eos=True)) - 1
    (folder / "short.txt").write_text(text)  # its one window scores the end of the document
    status, _, err = evaluate(*args, "--lengths", str(length), data="short.txt")
    assert status == 2 and "--data short.txt: the scored tokens have no text; choose other" in err
    (folder / "longer.txt").write_text(text * 2)
    assert evaluate(*args, "--lengths", str(length), data="longer.txt")[0] == 0


def test_scalings_may_be_written_as_the_error_says(evaluate):
    options = ("--lengths", "8", "--windows", "2", "--join")
    status, _, err = evaluate("--model", "runs/a", "--rope", "8", *options)
    assert status == 2 and "must list kinds, or scalings such as {kind: yarn}" in err
    assert evaluate("--model", "runs/a", "--rope", "{kind: yarn}", *options)[0] == 0


def test_the_field_of_json_that_holds_the_text_may_be_named(evaluate, folder):
    (folder / "pairs.json").write_text(json.dumps([{"output": "def f(x):\n    return x\n" * 30}]))
    args = ("--model", "runs/a", "--lengths", "16,64")
    status, _, err = evaluate(*args, data="pairs.json")
    assert status == 2 and "has 'output': name the one with the text (field)" in err
    assert evaluate(*args, "--field", "output", data="pairs.json")[0] == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "--model PATH: name a run"),
        (["--model", "runs/a", "--rope", "ntk"], r"rope ntk: rope\.alpha: is required"),
        (["--model", "runs/a", "--rope", "{kind: ntk"], r"\[{kind: ntk\]' is not a YAML value"),
        (["--model", "runs/a", "--rope", ""], "--rope '': must list kinds"),
        (["--rope", "none", "--model", "runs/a"], "--rope none: .* after the --model"),
        (
            ["--model", "runs/a", "--rope", "none", "--rope", "linear"],
            "--rope linear: .* once: .* commas",
        ),
        (["--tokenizer", "x", "--model", "runs/a"], "--tokenizer x: must come after the --model"),
        (["--model", "=runs/a"], "=runs/a: no such folder"),
        (["--model", "runs/a", "--model", "runs/a"], "two are called 'a'"),
        (["--model", "runs/none"], "runs/none"),
        (["--model", "runs/a", "--lengths", "0,5"], "--lengths=0,5: "),
        (["--model", "runs/a", "--lengths", "8,many"], "--lengths=8,many: "),
        (["--model", "runs/a", "--lengths", "8,9999999999"], "--lengths=8,9999999999: "),
        (["--model", "runs/a", "--lengths", "8", "--stride", "9"], "--stride=9: .* from 1 to .* 8"),
        (["--model", "runs/a", "--windows", "-1"], "--windows=-1"),
        (["--model", "runs/a", "--lengths", "100000"], "length 100,000 needs .* together have"),
        (["--model", "runs/a", "--lengths", "80"], "length 80 needs .*: --join cuts windows"),
        (["--model", "runs/a", "--data", "no.txt"], "no.txt"),
        (["--model", "runs/a", "--field", "a"], "--field a: is for JSON and Parquet, which --data"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(args, said, evaluate, tmp_path):
    status, out, err = evaluate(*args)
    assert status == 2 and not out
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(said, line), line
    assert not list(tmp_path.rglob("perplexity.*"))


def test_models_with_several_tokenizers_compare_by_bits_per_byte(evaluate, folder):
    changes = ["run.name=c", "training.steps=2", "tokenizer.vocab_size=300"]
    train(recipes.load(folder / "recipe.yaml", changes))
    args = ("--model", "runs/a", "--model", "runs/c", "--lengths", "16", "--join", "--windows", "0")
    status, out, err = evaluate(*args)
    assert status == 0 and "tokenizers differ" in err
    head, *rows = out.splitlines()[:3]
    assert head.startswith("bits per byte ") and "perplexity of" not in out
    assert [row.split()[0] for row in rows] == ["a", "c"]


def test_a_model_may_be_read_with_another_tokenizer_or_none(evaluate, folder):
    options = ("--lengths", "16", "--join", "--windows", "2")
    shutil.copytree(folder / "runs" / "a", folder / "bare")
    tokenizer = folder / "bare" / "tokenizer.model"
    tokenizer.rename(folder / "other.model")
    status, _, err = evaluate("--model", "bare", *options)
    assert status == 2 and "has no tokenizer; give one after its --model" in err
    _, wanted, _ = evaluate("--model", "bare=runs/a", *options)
    status, out, _ = evaluate("--model", "bare", "--tokenizer", "other.model", *options)
    assert (status, out) == (0, wanted)


def test_two_models_of_one_name_are_given_names(evaluate):
    options = ("--lengths", "16", "--join", "--windows", "2")
    status, _, err = evaluate("--model", "runs/a", "--model", "runs/a", *options)
    assert status == 2 and "two are called 'a'; name them: --model NAME=PATH" in err
    assert evaluate("--model", "runs/a", "--model", "again=runs/a", *options)[0] == 0


def test_json_has_the_figures_and_nothing_else(evaluate, folder):
    text = "def f(x):\n    return x\n" * 40
    (folder / "plain.txt").write_text(text)
    options = ("--lengths", "8,16", "--stride", "1", "--windows", "0", "--json")
    status, out, _ = evaluate("--model", "runs/a", *options, data="plain.txt")
    assert status == 0
    short, long = json.loads(out)
    assert (short["model"], short["length"], long["length"]) == ("a", 8, 16)
    tokens = long["windows"] * long["stride"]
    scored_bytes = tokens * math.log2(long["perplexity"]) / long["bits_per_byte"]
    tokenizer = jllama.load(folder / "runs" / "a").tokenizer
    # Every token after the first 16 is scored.
    wanted = len(text.encode()) - tokenizer.byte_count(tokenizer.encode(text)[:15])
    assert scored_bytes == pytest.approx(wanted, abs=1.01)


@pytest.mark.parametrize(
    "values", [(5.4, 5.9), (5.46, 138.0), (1.01, 1.02), (2.0, 30000.0)], ids=str
)
def test_ticks_are_few_round_numbers_in_the_range(values):
    ticks = perplexity_report._ticks(list(values))
    assert 4 <= len(ticks) <= 12
    assert all(len(f"{tick:g}") <= 6 for tick in ticks)
    assert min(ticks) >= 0.9 * values[0] and max(ticks) <= 1.1 * values[1]
