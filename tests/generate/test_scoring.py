"""Logits of rows of several lengths, and the log-probabilities of choices."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny

import jllama
from jllama.config import TrainedTokenizer
from jllama.errors import UserError
from jllama.generate import engine, scoring
from jllama.generate.llama import Llama
from jllama.text.vocabulary import train_sentencepiece

FIXTURES = Path(__file__).parent.parent / "fixtures"
CONFIG = tiny.config(vocab_size=400, num_layers=2, num_kv_heads=2, max_length=192)


@pytest.fixture(scope="module")
def model():
    tokenizer = train_sentencepiece(
        [Path(__file__).read_text()], TrainedTokenizer(kind="train", vocab_size=380)
    )
    return Llama(CONFIG, tiny.params(CONFIG, scale=6.0), tokenizer, tiny.compute())


def with_rope(model, rope):
    return dataclasses.replace(model, config=dataclasses.replace(model.config, rope=rope))


def row(length, seed=0):
    return tiny.tokens(length, vocab_size=400, seed=seed).tolist()


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def wanted(model, before, after):
    """The log-probabilities of `after`, in float64."""
    logits = reference.logits(model.params, model.config, [before + after])[0]
    return log_softmax(logits)[np.arange(len(before), len(before) + len(after)) - 1, after]


@pytest.mark.parametrize("rope", [CONFIG.rope, tiny.DYNAMIC], ids=lambda rope: rope.kind)
def test_rows_of_several_lengths_have_the_logits_that_each_has_alone(model, rope):
    model = with_rope(model, rope)
    rows = [row(n, seed=n) for n in (1, 33, 5)]
    got = model.logits(rows)
    assert [x.shape for x in got] == [(1, 400), (33, 400), (5, 400)]
    for ids, logits in zip(rows, got, strict=True):
        exact = reference.logits(model.params, model.config, [ids])
        assert logits.dtype == np.float32
        assert tiny.relative_error(logits, exact) < 1e-5
    unpadded = tiny.logits(model.params, model.config, np.array(rows[1:2]))
    assert tiny.relative_error(got[1], unpadded) < 2e-6


def test_a_length_is_that_of_every_row(model):
    model = with_rope(model, tiny.DYNAMIC)
    rows = [row(5), row(9)]
    for ids, logits in zip(rows, model.logits(rows, length=100), strict=True):
        exact = reference.logits(model.params, model.config, [ids], length=100)
        assert tiny.relative_error(logits, exact) < 1e-5
    with pytest.raises(UserError, match="length=8 is below the 9 ids"):
        model.logits(rows, length=8)


def test_each_bucket_of_lengths_is_compiled_once(model):
    # A size that nothing has compiled yet.
    model = dataclasses.replace(model, config=dataclasses.replace(CONFIG, max_length=193))
    engine.traces.clear()
    for length in range(1, 24):
        assert model.logits([row(length)]).shape == (1, length, 400)
    assert engine.traces == {"logits": 1}
    model.logits([row(40)])
    assert engine.traces == {"logits": 2}
    model.logits([row(n) for n in (3, 50)])
    assert engine.traces == {"logits": 3}  # another number of rows
    model.logits([row(n) for n in (64, 1)])
    assert engine.traces == {"logits": 3}


@pytest.mark.parametrize("rope", [CONFIG.rope, tiny.DYNAMIC], ids=lambda rope: rope.kind)
def test_scores_are_the_log_softmax_of_the_models_logits(model, rope, monkeypatch):
    model = with_rope(model, rope)
    monkeypatch.setattr(scoring, "PASS_TOKENS", 64)  # several passes
    prompts = [row(n, seed=n) for n in (1, 12, 3)]
    choices = [[row(n, seed=9 * n) for n in sizes] for sizes in ((1, 2), (3,), (2, 40))]
    given = zip(prompts, choices, model.score(prompts, choices), strict=True)
    for before, several, scores in given:
        for after, score in zip(several, scores, strict=True):
            assert score.ids == tuple(after)
            exact = wanted(model, before, after)
            np.testing.assert_allclose(score.logprobs, exact, rtol=1e-5, atol=1e-4)
            assert score.logprob == pytest.approx(exact.sum(), rel=1e-5)


def test_few_programs_score_many_choices(model):
    model = dataclasses.replace(model, config=dataclasses.replace(CONFIG, max_length=193))
    engine.traces.clear()
    prompts = [row(n, seed=n) for n in range(1, 24)]
    model.score(prompts, [[row(n % 8 + 1), row(8)] for n in range(23)])
    assert engine.traces == {"logprobs": 1}


def test_scores_are_those_of_transformers():
    saved = np.load(FIXTURES / "hf-llama3.npz")
    model = jllama.load(FIXTURES / "hf-llama3", dtype="float32")
    ids, positions = saved["ids"].tolist(), saved["positions"]
    first = positions[-8]
    assert positions[-8:].tolist() == list(range(first, len(ids)))
    exact = log_softmax(saved["logits"][-8:-1])[np.arange(7), ids[first + 1 :]]
    ((score,),) = model.score([ids[: first + 1]], [[ids[first + 1 :]]])
    np.testing.assert_allclose(score.logprobs, exact, rtol=1e-5, atol=1e-5)


def test_texts_are_scored_as_ids_with_one_list_of_choices_or_one_for_each_prompt(model):
    choices, encode = [" import", " os, x"], model.tokenizer.encode
    both = model.score(["from jllama", ""], choices)
    before = encode("from jllama", bos=True)
    whole = [encode(f"from jllama{choice}", bos=True) for choice in choices]
    by_ids = [[ids[len(before) :] for ids in whole], [encode(choice) for choice in choices]]
    assert both == model.score([before, []], by_ids)
    assert both == model.score(["from jllama", ""], [choices, choices])
    assert [score.ids for score in model.score("from jllama", choices)[0]] == list(
        map(tuple, by_ids[0])
    )


def test_a_completion_has_the_logprobs_that_its_ids_score(model):
    prompts = [[1, 2, 3], list(range(37))]
    completions = model.complete(prompts, max_new_tokens=20, temperature=1.5, top_k=50, seed=1)
    scores = model.score(prompts, [[completion.ids] for completion in completions])
    for completion, (score,) in zip(completions, scores, strict=True):
        np.testing.assert_allclose(completion.logprobs, score.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "choices", "said"),
    [
        ("a", "b", "choices: give a list of texts"),
        ("a", [], "choices: give a list of texts"),
        (["a"], [["b"], ["c"]], "choices: 2 lists of choices for 1 prompts"),
        (["a"], [["b", ""]], "prompt 0, choice 1: the choice is empty"),
        (["a "], [""], "prompt 0, choice 0: the choice is empty"),
        ([[1]], ["b"], "prompt 0, choice 0: one is a text and one is ids"),
        ([[1], [2]], [[[3]], [[400]]], "prompt 1, choice 0: id 400 is not in the vocabulary"),
        ([[1] * 190], [[[3] * 3]], "190 tokens and 3 of the choice exceed .* max_length=192"),
    ],
)
def test_what_cannot_be_scored_is_one_line(model, prompts, choices, said):
    with pytest.raises(UserError, match=said):
        model.score(prompts, choices)


def test_without_a_tokenizer_ids_can_be_scored_and_texts_cannot(model):
    bare = dataclasses.replace(model, tokenizer=None)
    assert bare.score([[1]], [[[3]]]) == model.score([[1]], [[[3]]])
    for prompts, choices in (("a", ["b"]), ([[]], [[[3]]])):
        with pytest.raises(UserError, match="no tokenizer; load it with one"):
            bare.score(prompts, choices)
