"""docs/new-language.md from its first command to its last, with its own recipes, smaller."""

import functools
import random
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import jllama
from jllama.cli import main
from jllama.config import TrainedTokenizer
from jllama.config import recipe as recipes
from jllama.store.write import write_model
from jllama.text.vocabulary import train_sentencepiece
from jllama.train import loop, run
from jllama.train.placement import make_placement

PAGE = Path(__file__).parent.parent / "docs" / "new-language.md"
LETTERS = "这本书很好房间干净服务员不错价格便宜喜欢故事一般"
SMALLER = [
    "training.schedule.warmup_steps=1",
    "training.steps=3",
    "training.batch_size=4",
    "data.length=120",
    "data.prepare.workers=1",
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with reviews, and a model that knows code alone as `runs/code`."""
    monkeypatch.chdir(tmp_path)
    one = functools.partial(make_placement, devices=jax.devices()[:1])
    monkeypatch.setattr(run, "make_placement", one)
    monkeypatch.setattr(run, "peak_flops", lambda dtype: (1e12, "published"))
    some = random.Random(0)
    words = ["".join(some.choices(LETTERS, k=3)) for _ in range(60)]
    Path("zh").mkdir()
    for name in ("zh/pos.txt", "zh/neg.txt", "held-out.txt"):
        reviews = ("，".join(some.choices(words, k=6)) + "。" for _ in range(200))
        Path(name).write_text("\n".join(reviews) + "\n")
    code = [Path(__file__).read_text()]
    tokenizer = train_sentencepiece(code, TrainedTokenizer(kind="train", vocab_size=400))
    model = tiny.config(vocab_size=400, num_layers=1, max_length=128, tie_embeddings=True)
    write_model(Path("runs/code"), model, tiny.params(model), tokenizer)
    return tmp_path


def test_the_page_of_a_new_language(here, capfd):
    for name, text in zip(("zh.yaml", "zh-chat.yaml"), blocks("yaml"), strict=True):
        Path(name).write_text(text)

    def jllama_(*words):
        assert main([*words]) == 0
        return capfd.readouterr().out

    def train(recipe):
        assert loop.train(recipes.load(Path(recipe), SMALLER)).done
        return capfd.readouterr().err

    jllama_("vocabulary", "train", "zh/*.txt", "--size", "340", "--out", "zh.model")
    said = jllama_(
        "vocabulary", "merge", "runs/code", "zh.model", "--out", "merged", "--pad", "[PAD]"
    )
    ids = int(re.match(r"merged: (\d+) pieces", said)[1])
    compared = jllama_("vocabulary", "compare", "runs/code", "merged", "--text", "held-out.txt")
    old, new = (float(line.split()[-2]) for line in compared.splitlines()[1:])
    assert new < old / 3
    said = jllama_("vocabulary", "grow", "runs/code", "merged", "grown", "--multiple", "64")
    assert f"grown: {ids} ids: 400 of runs/code and {ids - 400} new (pieces), " in said

    assert "trained over them" in train("zh.yaml")
    said = jllama_("convert", "grown", "zh-llama", "--adapter", "runs/zh", "--to", "jllama")
    assert said.startswith("zh-llama: jllama, float32, ")
    grown, learned = (jllama.load(name) for name in ("grown", "zh-llama"))
    assert learned.config == grown.config and learned.tokenizer.digest == grown.tokenizer.digest
    rows, before = (np.asarray(m.params["embedding"]["weight"]) for m in (learned, grown))
    assert (rows[:ids] != before[:ids]).any(1).all()  # whole, the old rows and the new ones
    assert not rows[ids:].any() and len(rows) % 64 == 0

    (program,) = blocks("python")
    exec(program, {})
    assert int(capfd.readouterr().out.split()[0]) > 300
    said = train("zh-chat.yaml")
    replies, documents = re.search(r"their prompt: ([\d,]+) of ([\d,]+) documents", said).groups()
    assert replies == documents and "; 0 of " in said
    model = jllama.load("zh-llama", adapter="runs/zh-chat")
    prompt = "### Instruction:\n写一条好评。\n\n### Response:\n"
    assert len(model.generate(prompt, max_new_tokens=8)) == 1
    tokens = [model.tokenizer.encode(prompt, bos=True)]
    assert model.logits(tokens).shape[-1] == ids
    assert tiny.relative_error(learned.logits(tokens), model.logits(tokens)) > 1e-3
