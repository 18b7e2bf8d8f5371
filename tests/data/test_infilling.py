"""Infilling at read time: rows keep their shape; cuts depend on (seed, epoch, document)."""

import collections

import numpy as np
import pytest

from jllama.config import Config, InfillObjective, PrepareConfig, TrainedTokenizer
from jllama.config import recipe as recipes
from jllama.data.dataset import Dataset
from jllama.data.opening import open_data, open_tokenizer
from jllama.data.pack import CutRows, WholeRows
from jllama.data.prepare import prepare
from jllama.data.rewrite import Infilling
from jllama.errors import UserError
from jllama.text.added import AddedToken
from jllama.text.infill import PIECES, infill_tokens
from jllama.text.spm import SentencePieceTokenizer
from jllama.text.vocabulary import train_sentencepiece


@pytest.fixture(scope="module")
def marked(texts):
    config = TrainedTokenizer(kind="train", vocab_size=309, infill=True)
    return train_sentencepiece(texts * 20, config)


@pytest.fixture
def prepared(tmp_path, texts, marked, write_jsonl):
    config = PrepareConfig(folder=str(tmp_path / "prepared"), workers=1, shards=3)
    return prepare(write_jsonl(texts), marked, config)


@pytest.fixture
def infilling(marked):
    def make(seed=0, **kwargs):
        return Infilling(InfillObjective(kind="infill", **kwargs), marked, seed)

    return make


def packings(prepared):
    return CutRows(prepared, 150), WholeRows(prepared, 150, "error", Infilling.gain)


def equal(a, b):
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def documents(row):
    """Returns the ids of each segment."""
    return [
        row["tokens"][row["segments"] == n].tolist() for n in range(1, row["segments"].max() + 1)
    ]


def original(tokenizer, ids):
    """Returns (text, "psm" or "spm" or "causal") of a document."""
    pre, suf, mid, end = infill_tokens(tokenizer)
    if pre not in ids:
        return tokenizer.decode(ids), "causal"
    at = ids.index(suf), ids.index(mid)
    prefix, suffix, middle = ids[2 : at[0]], ids[at[0] + 1 : at[1]], ids[at[1] + 1 :]
    assert ids[0] == tokenizer.bos_id and ids[-1] == end
    decode = tokenizer.decode
    return decode(prefix) + decode(middle) + decode(suffix), "psm" if prefix else "spm"


def test_every_document_is_there_in_some_order(prepared, infilling, marked, texts):
    transform = infilling(rate=0.9, spm=0.5)
    originals, kinds = [], collections.Counter()
    rows = WholeRows(prepared, 200, "error", Infilling.gain)
    for epoch in range(8):
        for i in range(len(rows)):
            for ids in documents(transform(rows[i], epoch)):
                text, kind = original(marked, ids)
                originals.append(text)
                kinds[kind] += 1
    assert sorted(originals) == sorted(texts * 8)
    assert 0.05 < kinds["causal"] / len(originals) < 0.15
    # `original` takes a PSM document with an empty prefix for SPM.
    assert 0.4 < kinds["spm"] / (kinds["spm"] + kinds["psm"]) < 0.6
    assert "; 0 of " in transform.report()


@pytest.mark.parametrize(("rate", "spm"), [(0, 0), (1, 0), (1, 1)])
def test_rate_and_share_are_fitting_at_their_ends(prepared, infilling, marked, rate, spm):
    transform, rows = (
        infilling(rate=rate, spm=spm),
        WholeRows(prepared, 200, "error", Infilling.gain),
    )
    made = [transform(rows[i], 0) for i in range(len(rows))]
    pre, suf, *_ = infill_tokens(marked)
    for row, before in zip(made, (rows[i] for i in range(len(rows))), strict=True):
        for ids in documents(row):
            assert (pre in ids) == (rate == 1)
            if rate == 1 and spm == 1:
                assert ids[1:3] == [pre, suf]
        assert rate or equal(row, before)


def test_rows_keep_their_shape_and_predict_all_but_the_first(prepared, infilling, marked):
    for rows in packings(prepared):
        for i in range(len(rows)):
            row, before = infilling()(rows[i], 0), rows[i]
            for key, value in before.items():
                assert row[key].dtype == value.dtype and row[key].shape == value.shape
            used = np.count_nonzero(row["segments"])
            assert not row["segments"][used:].any() and not row["tokens"][used:].any()
            first = np.diff(row["segments"], prepend=0) != 0
            assert (row["weights"] == ((row["segments"] > 0) & ~first)).all()


def test_a_document_that_the_row_cuts_stays_as_it_is(prepared, infilling, marked):
    rows, transform = CutRows(prepared, 60), infilling(rate=1.0)
    partial = 0
    for i in range(len(rows)):
        for n, ids in enumerate(documents(rows[i]), start=1):
            row = transform(rows[i], 3)
            if (ids[0], ids[-1]) != (marked.bos_id, marked.eos_id):
                tokens = row["tokens"][row["segments"] == n].tolist()
                assert tokens == ids[: len(tokens)]
                partial += 1
    assert partial


def test_what_has_no_room_is_cut_and_counted(prepared, infilling):
    transform = infilling(rate=1.0)
    rows = WholeRows(prepared, 100, "skip")  # without spare room
    fitting = sum(int(transform(rows[i], 0)["weights"].sum()) for i in range(len(rows)))
    roomy = infilling(rate=1.0)

    def wide(row):
        return {
            key: np.concatenate([value, np.zeros(300, value.dtype)]) for key, value in row.items()
        }

    whole = sum(int(roomy(wide(rows[i]), 0)["weights"].sum()) for i in range(len(rows)))
    assert fitting < whole
    assert transform.report().endswith(
        f" {whole - fitting:,} of {whole:,} predicted tokens had no room in their row"
    )
    assert roomy.report().endswith(f" 0 of {whole:,} predicted tokens had no room in their row")
    spare = WholeRows(prepared, 100, "skip", Infilling.gain)
    transform = infilling(rate=1.0)
    for i in range(len(spare)):
        transform(spare[i], 0)
    assert int(transform.report().split("; ")[1].split()[0]) < (whole - fitting) / 4


def test_a_split_depends_on_seed_epoch_and_document_alone(prepared, infilling):
    rows, wide = (WholeRows(prepared, n, "error", Infilling.gain) for n in (200, 900))
    cut = CutRows(prepared, 2 * prepared.tokens)

    def split_documents(rows, transform, epoch):
        made = [transform(rows[i], epoch) for i in range(len(rows))]
        return {tuple(ids) for row in made for ids in documents(row)}

    base = split_documents(wide, infilling(), 0)
    assert base == split_documents(wide, infilling(), 0)
    assert len(base & split_documents(wide, infilling(), 1)) < len(base) / 3
    assert len(base & split_documents(wide, infilling(seed=1), 0)) < len(base) / 3
    # Another packing, another length: the same splits.
    assert base == split_documents(rows, infilling(), 0) == split_documents(cut, infilling(), 0)


@pytest.mark.parametrize("packing", [0, 1])
def test_batches_are_pure_and_epochs_differ(prepared, infilling, packing):
    rows = packings(prepared)[packing]

    def data():
        return Dataset({"a": rows, "b": rows}, {"a": 2.0, "b": 1.0}, 4, 0, infilling())

    first, other = data(), data()
    last = 3 * len(rows)
    backwards = [other.batch(t) for t in reversed(range(last))][::-1]
    assert all(equal(first.batch(t), backwards[t]) for t in range(last))
    steps = first.iterate(5, rows=[1, 2], prefetch=4)
    for t in range(5, 12):
        step, batch = next(steps)
        assert step == t and equal(batch, {k: v[1:3] for k, v in other.batch(t).items()})
    alone = Dataset({"a": rows}, {"a": 1.0}, len(rows), 0, infilling())
    # The rows have the same order as without infilling.
    plain = Dataset({"a": rows}, {"a": 1.0}, len(rows), 0)
    epochs = [
        {tuple(ids) for row in unstacked(alone.batch(t)) for ids in documents(row)} for t in (0, 1)
    ]
    assert len(epochs[0] & epochs[1]) < len(epochs[0]) / 2
    for t in (0, 1):
        for row, before in zip(unstacked(alone.batch(t)), unstacked(plain.batch(t)), strict=True):
            assert equal(row, infilling()(before, t))


def unstacked(batch):
    return [{k: v[i] for k, v in batch.items()} for i in range(len(batch["tokens"]))]


@pytest.fixture
def recipe(tmp_path, texts, write_jsonl):
    path = recipes.configs_folder() / "train" / "tiny.yaml"
    whole = recipes.to_dict(recipes.load(path, ["tokenizer.vocab_size=309"]))
    whole["tokenizer"]["infill"] = True
    whole["data"] = {
        "length": 150,
        "packing": {"kind": "whole"},
        "objective": {"kind": "infill"},
        "train": [recipes.to_dict(write_jsonl(texts[:50], "train"))],
        "held_out": [recipes.to_dict(write_jsonl(texts[50:], "held_out"))],
        "prepare": {"folder": str(tmp_path / "prepared"), "workers": 1},
    }
    return lambda *overrides: recipes.validate(Config, recipes.override(whole, overrides), "recipe")


def test_a_recipe_infills_training_rows_alone_and_prepares_nothing_anew(recipe, monkeypatch):
    tokenizer = open_tokenizer(recipe())
    data = open_data(recipe(), tokenizer)
    marks = infill_tokens(tokenizer)
    assert np.isin(data.train.batch(0)["tokens"], marks).any()
    held_out = data.held_out_rows["held_out"]
    assert not any(np.isin(held_out[i]["tokens"], marks).any() for i in range(len(held_out)))
    monkeypatch.setattr("jllama.data.prepare._make", None)
    causal = open_data(recipe("data.objective.kind=causal"), tokenizer)
    assert causal.train.objective is None
    assert not np.isin(causal.train.batch(0)["tokens"], marks).any()


def test_a_marker_that_no_training_source_has_is_refused_even_where_one_may_lack_it(recipe):
    reply = (
        "data.objective={kind: reply, no_marker: predict}",
        "data.packing={kind: whole, too_long: skip}",
    )
    tokenizer = open_tokenizer(recipe())
    with pytest.raises(UserError, match=r"after='### Response:': does not appear in any training"):
        open_data(recipe(*reply), tokenizer)
    with pytest.raises(UserError, match="source train: none of its documents fits a row"):
        open_data(recipe(*reply, "data.length=2"), tokenizer)


def test_documents_that_no_row_holds_whole_are_said(recipe, capsys):
    tokenizer = open_tokenizer(recipe())
    for packing, length, said in (("cut", 400, False), ("cut", 20, True), ("whole", 150, False)):
        open_data(recipe(f"data.packing={{kind: {packing}}}", f"data.length={length}",
                         "model.max_length=400"), tokenizer)  # fmt: skip
        assert ("only these are cut for infilling" in capsys.readouterr().err) == said


def test_a_tokenizer_without_infill_tokens_is_an_error_before_text_is_prepared(recipe, monkeypatch):
    without = recipe("tokenizer.infill=false")
    tokenizer = open_tokenizer(without)
    monkeypatch.setattr("jllama.data.prepare._make", None)
    with pytest.raises(UserError, match=r"no ▁<PRE>.*tokenizer\.infill=true"):
        open_data(without, tokenizer)


def test_special_tokens_may_lack_rows_and_those_of_infilling_may_not(recipe):
    """Code Llama 34B has infill tokens in its tokenizer and no rows for them."""
    model = open_tokenizer(recipe("tokenizer.infill=false")).model
    added = [AddedToken(piece, 309 + i) for i, piece in enumerate(PIECES)]
    tokenizer = SentencePieceTokenizer(model, added=added)
    assert (tokenizer.vocab_size, tokenizer.text_size) == (313, 309)
    file = "tokenizer={kind: file, path: x}"
    causal = recipe("model.vocab_size=309", "data.objective.kind=causal", file)
    assert open_data(causal, tokenizer).train.batch(0)["tokens"].max() < 309
    infill = ("data.objective.kind=infill", file)
    with pytest.raises(UserError, match=r"no rows for the .*; raise it to 313, or train with ano"):
        open_data(recipe("model.vocab_size=309", *infill), tokenizer)
    open_data(recipe("model.vocab_size=313", *infill), tokenizer)
    with pytest.raises(UserError, match=r"313 pieces; raise model\.vocab_size to that number"):
        open_data(recipe("model.vocab_size=308", "data.objective.kind=causal", file), tokenizer)
    open_data(recipe("model.vocab_size=313", "data.objective.kind=causal", file), tokenizer)


def test_without_bos_documents_are_infilled_where_rows_hold_them_whole(recipe):
    tokenizer = open_tokenizer(recipe())
    bare = SentencePieceTokenizer(tokenizer.model, adds_bos=False)
    data = open_data(recipe("data.objective={kind: infill, rate: 1.0, spm: 0.0}"), bare)
    tokens = data.train.batch(0)["tokens"]
    assert np.isin(tokens, infill_tokens(bare).middle).any()
    assert not np.isin(tokens, bare.bos_id).any()
    with pytest.raises(UserError, match=r"needs data\.packing\.kind=whole, because the tokenizer"):
        open_data(recipe("data.packing.kind=cut"), bare)
