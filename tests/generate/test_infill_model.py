"""Infilling with a model, and sample.py's part in it: prompts, stopping at EOT, exact middles."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny

import jllama
from jllama.config import TrainedTokenizer
from jllama.errors import UserError
from jllama.generate import engine
from jllama.generate.llama import Llama
from jllama.text.infill import PIECES, Infill, infill_tokens, prompt_ids
from jllama.text.vocabulary import train_sentencepiece

TEXT = Path(__file__).read_text()


@pytest.fixture(scope="module")
def tokenizer():
    config = TrainedTokenizer(kind="train", vocab_size=400, infill=True)
    return train_sentencepiece([TEXT], config)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = tiny.config(vocab_size=400, num_layers=2, max_length=256)
    return Llama(config, tiny.params(config, scale=9.0, seed=1), tokenizer, tiny.compute())


def drawn(model, prompt, count):
    """Greedy ids, whatever they are."""
    request = engine.Request(
        prompt=tuple(prompt), max_new_tokens=count, sampling=engine.Sampling(temperature=0.0)
    )
    return engine.generate(model.params, model.config, model.compute, [request])[0]


def saying(model, at, id):
    """The model with the head's rows swapped, so that its greedy token `at` is `id`."""
    head = model.params["head"]["weight"]
    rows = np.array([at, id])
    params = {**model.params, "head": {"weight": head.at[rows[::-1]].set(head[rows])}}
    return dataclasses.replace(model, params=params)


@pytest.mark.parametrize("format", ["psm", "spm"])
def test_a_middle_ends_at_eot_and_so_does_a_text(model, tokenizer, format):
    infill = Infill("def f(x):\n    ", "\n    return y\n", format)
    prompt = prompt_ids(tokenizer, infill)
    first = drawn(model, prompt, 20)
    last = next(i for i in range(1, 20) if first[i] not in first[:i])
    ending = saying(model, first[last], infill_tokens(tokenizer).end)
    assert drawn(ending, prompt, 20)[last] == infill_tokens(tokenizer).end
    middle = ending.infill(infill.prefix, infill.suffix, format=format, temperature=0.0)
    stream = tokenizer.stream(after=tokenizer.encode("☺"))
    wanted = "".join(stream.feed(i) for i in first[:last]) + stream.end()
    assert middle == [wanted]
    assert "".join(ending.stream(infill, temperature=0.0)) == wanted
    # After a text too, of a model that was taught to infill; ids stop where their caller says.
    (longer,) = ending.complete([prompt], temperature=0.0, max_new_tokens=40)
    assert longer.ids[:last] == tuple(first[:last]) and len(longer.ids) > last
    plain = drawn(model, text := [tokenizer.bos_id, *tokenizer.encode("def f")], 20)
    last = next(i for i in range(1, 20) if plain[i] not in plain[:i])
    ending = saying(model, plain[last], infill_tokens(tokenizer).end)
    assert ending.generate("def f", temperature=0.0, max_new_tokens=40) == [
        tokenizer.decode([*text, *plain[:last]]).removeprefix("def f")
    ]


def test_several_prompts_and_samples_keep_their_order(model):
    one, two = Infill("a = ", "\n"), Infill("", "b", "spm")
    settings = {"max_new_tokens": 8, "num_samples": 2, "seed": 3}
    both = model.generate([one, "c", two], batch_size=2, **settings)
    assert both[:2] == model.infill("a = ", "\n", **settings)
    assert both[2:4] == model.generate("c", **settings)
    assert both[4:] == model.infill("", "b", format="spm", **settings)


def test_bad_prompts_are_one_line(model):
    with pytest.raises(UserError, match="format 'pms' is unknown"):
        model.infill("a", "b", format="pms")
    with pytest.raises(UserError, match="exceed the model's max_length=256"):
        model.infill("one two three " * 100, "b", max_new_tokens=5)
    without = train_sentencepiece([TEXT], TrainedTokenizer(kind="train", vocab_size=400))
    with pytest.raises(UserError, match=f"no {PIECES[0]}"):
        dataclasses.replace(model, tokenizer=without).infill("a", "b")


def test_sample_fills_in_the_prompt_or_between_files(sample, model, capsys, tmp_path):
    wanted = model.infill("def f(x): ", " return y", max_new_tokens=6, temperature=0, top_p=1.0)
    sample("--prompt", "def f(x): <FILL_ME> return y", "--temperature=0")
    assert [capsys.readouterr().out] == wanted
    (tmp_path / "before").write_text("def f(x): ")
    (tmp_path / "after").write_text(" return y")
    files = [f"--prefix-file={tmp_path / 'before'}", f"--suffix-file={tmp_path / 'after'}"]
    sample(*files, "--temperature=0")
    assert [capsys.readouterr().out] == wanted
    sample(*files, "--temperature=0", "--infill-format=spm")
    settings = {"max_new_tokens": 6, "temperature": 0}
    assert [capsys.readouterr().out] == model.infill(
        "def f(x): ", " return y", format="spm", **settings
    )


def test_two_places_are_one_line_before_the_model_is_read(sample, monkeypatch):
    monkeypatch.setattr(jllama, "load", None, raising=False)
    with pytest.raises(UserError, match="<FILL_ME> appears 2 times"):
        sample("--prompt", "<FILL_ME> <FILL_ME>")
