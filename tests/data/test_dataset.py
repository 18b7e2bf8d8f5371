"""Batches: a pure function of (data, seed, step), mixed by weight, whole for evaluation."""

import re
import subprocess
import sys

import numpy as np
import pytest

from jllama.config import Config
from jllama.config import recipe as recipes
from jllama.data.dataset import Dataset, eval_batches
from jllama.data.opening import open_data, open_tokenizer
from jllama.data.pack import CutRows
from jllama.errors import UserError


class Numbered:
    """`count` rows; each holds its number."""

    def __init__(self, count, first=0):
        self.count, self.first, self.read = count, first, []

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        self.read.append(row)
        return {
            "tokens": np.full(4, self.first + row, np.int32),
            "segments": np.ones(4, np.int32),
            "weights": np.ones(4, np.float32),
        }


def dataset(sizes=(10,), weights=None, batch_size=4, seed=0):
    names = "abcdef"[: len(sizes)]
    weights = weights or [1.0] * len(sizes)
    rows = {
        n: Numbered(size, 1000 * i) for i, (n, size) in enumerate(zip(names, sizes, strict=True))
    }
    return Dataset(rows, dict(zip(names, weights, strict=True)), batch_size, seed)


def numbers(data, steps):
    return np.concatenate([data.batch(t)["tokens"][:, 0] for t in steps])


def equal(a, b):
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def test_a_batch_depends_on_seed_and_step_alone():
    data, again = dataset(), dataset()
    backwards = [again.batch(t) for t in reversed(range(9))][::-1]
    assert all(equal(data.batch(t), backwards[t]) for t in range(9))
    assert (numbers(data, range(9)) != numbers(dataset(seed=1), range(9))).any()


def test_each_epoch_holds_every_row_once_in_another_order():
    epochs = numbers(dataset(sizes=(100,), batch_size=10), range(50)).reshape(5, 100)
    assert (np.sort(epochs) == np.arange(100)).all()
    assert len({tuple(e) for e in epochs}) == 5


def test_iterating_from_any_step_gives_the_same_batches():
    data = dataset(sizes=(30, 7), weights=[3, 1])
    for start in (0, 5, 100_000):
        for prefetch in (0, 1, 4):
            steps = data.iterate(start, prefetch=prefetch)
            for wanted in range(start, start + 6):
                step, batch = next(steps)
                assert step == wanted and equal(batch, data.batch(step))


def test_a_mixture_keeps_its_proportions_and_each_source_its_own_epoch():
    data = dataset(sizes=(50, 20), weights=[3.0, 1.0], batch_size=8)
    seen = numbers(data, range(100))
    assert abs(np.count_nonzero(seen < 1000) - 600) <= 1
    for part, size in ((seen[seen < 1000], 50), (seen[seen >= 1000] - 1000, 20)):
        whole = part[: len(part) // size * size].reshape(-1, size)
        assert (np.sort(whole) == np.arange(size)).all()


def test_adding_a_source_keeps_the_order_of_the_others():
    alone = numbers(dataset(sizes=(50,)), range(10))
    mixed = numbers(dataset(sizes=(50, 20)), range(20))
    assert (mixed[mixed < 1000][:40] == alone).all()


def test_part_of_a_batch_reads_no_other_rows():
    data = dataset(sizes=(100,), batch_size=8)
    whole = data.batch(3)
    data.rows["a"].read.clear()
    part = data.batch(3, range(2, 5))
    assert len(data.rows["a"].read) == 3
    assert equal(part, {k: v[2:5] for k, v in whole.items()})
    assert equal(next(data.iterate(3, range(2, 5)))[1], part)


def test_a_source_without_rows_is_an_error():
    with pytest.raises(UserError, match="source b: has no rows"):
        dataset(sizes=(3, 0))


def test_a_source_of_documents_that_are_all_too_long_is_cut_or_gets_longer_rows(recipe):
    few = changed(recipe, "data.packing={kind: whole, too_long: skip}", "data.length=4")
    tokenizer = open_tokenizer(recipe)
    said = r"source train: none of its documents fits a row; raise data\.length, or set \S+=cut$"
    with pytest.raises(UserError, match=said):
        open_data(few, tokenizer)
    for way in ("data.packing.too_long=cut", "data.length=200"):
        assert open_data(changed(few, way), tokenizer).train.batch(0)["weights"].any()


def test_two_sources_of_one_name_are_told_apart(recipe, texts, write_jsonl):
    parts = {"one": texts[:20], "two": texts[20:50]}
    twice = [recipes.to_dict(write_jsonl(t, n)) | {"name": "train"} for n, t in parts.items()]
    tokenizer = open_tokenizer(recipe)
    whole = recipes.to_dict(recipe)
    whole["data"]["train"] = twice
    with pytest.raises(UserError, match=r"^data\.train: two sources are named train; rename one$"):
        open_data(recipes.validate(Config, whole, "recipe"), tokenizer)
    twice[1]["name"] = "other"
    data = open_data(recipes.validate(Config, whole, "recipe"), tokenizer)
    assert data.sources.keys() == {"train", "other"}


def test_evaluation_has_every_row_once_and_pads_the_last_batch():
    batches = list(eval_batches(Numbered(10), 3, 4))
    assert np.concatenate([b["tokens"][:, 0] for b in batches]).tolist() == [*range(10), 0, 0]
    assert [b["tokens"].shape for b in batches] == [(4, 4)] * 3
    for key in ("segments", "weights"):
        assert batches[-1][key].any(axis=1).tolist() == [True, True, False, False]
    assert len(list(eval_batches(Numbered(10), 3, 4, max_rows=4))) == 1


@pytest.fixture
def recipe(tmp_path, texts, write_jsonl):
    data = {
        "length": 16,
        "packing": {"kind": "cut"},
        "train": [recipes.to_dict(write_jsonl(texts[:50], "train"))],
        "held_out": [recipes.to_dict(write_jsonl(texts[50:], "held_out"))],
        "prepare": {"folder": str(tmp_path / "prepared"), "workers": 1},
    }
    path = recipes.configs_folder() / "train" / "tiny.yaml"
    whole = recipes.to_dict(recipes.load(path, ["tokenizer.vocab_size=300"]))
    whole["data"] = data
    return recipes.validate(Config, whole, "recipe")


def test_a_recipe_opens_to_training_and_held_out_rows(recipe, tmp_path, monkeypatch):
    tokenizer = open_tokenizer(recipe)
    data = open_data(recipe, tokenizer)
    assert data.train.batch(0)["tokens"].shape == (recipe.training.batch_size, 17)
    held_out = data.held_out["held_out"]
    assert held_out.documents == 10
    batches = eval_batches(data.held_out_rows["held_out"], 16, 4)
    scored = sum(batch["weights"].sum() for batch in batches)
    assert scored == held_out.tokens - held_out.documents
    monkeypatch.setattr("jllama.data.opening.train_sentencepiece", None)
    monkeypatch.setattr("jllama.data.prepare._make", None)
    assert open_tokenizer(recipe).digest == tokenizer.digest
    assert equal(open_data(recipe, tokenizer).train.batch(7), data.train.batch(7))


def test_batches_of_prepared_text_are_the_same_in_threads(prepare_texts):
    rows = CutRows(prepare_texts(block_tokens=7), 16)
    data = Dataset({"texts": rows}, {"texts": 1.0}, 8, seed=3)
    steps = data.iterate(2, prefetch=8)
    for _ in range(40):
        step, batch = next(steps)
        assert equal(batch, data.batch(step))


def test_tokenising_processes_do_not_import_jax():
    program = "import sys, jllama.data.prepare, jllama.data.worker; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def changed(recipe, *overrides):
    return recipes.validate(Config, recipes.override(recipes.to_dict(recipe), overrides), "recipe")


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_missing_files_are_named_by_key_before_a_tokenizer_is_trained(
    recipe, tmp_path, part, capfd
):
    bad = changed(recipe, f"data.{part}.0.source.files=[{tmp_path}]")
    expected = rf"^data\.{part}\.0\.source\.files: {tmp_path}: is a folder"
    with pytest.raises(UserError, match=expected):
        open_tokenizer(bad)
    assert "tokenizer: training" not in capfd.readouterr().err
    # With an existing tokenizer, the missing text is an error when it is prepared.
    with pytest.raises(UserError, match=expected):
        open_data(bad, open_tokenizer(recipe))


def test_a_missing_tokenizer_is_named_by_key_with_where_it_comes_from(recipe, tmp_path):
    file = ["tokenizer.kind=file", f"tokenizer.path={tmp_path}/a.model"]
    missing = changed(recipe, *file)
    with pytest.raises(
        UserError, match=r"^tokenizer\.path: .*/a\.model: no such .*model's weights"
    ) as error:
        open_tokenizer(missing)
    kind, size = re.search(r"set (\S+) and (\S+) to train one", str(error.value)).groups()
    assert open_tokenizer(changed(missing, kind, f"{size}=300")).vocab_size == 300
