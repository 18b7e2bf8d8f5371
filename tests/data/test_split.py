"""A share of each source is held out by the texts alone, and read without preparing it anew."""

import dataclasses
import hashlib
import itertools
import re

import numpy as np
import pytest
import recipes

from jllama.config import Config, HeldOutShare, TextSource
from jllama.config import recipe as configs
from jllama.data.opening import open_data, open_tokenizer
from jllama.data.pack import CutRows, WholeRows
from jllama.data.split import split, texts_of
from jllama.errors import UserError


def share(one_in):
    return HeldOutShare(**{"from": "train"}, one_in=one_in)


@pytest.fixture
def sides(prepare_texts, write_jsonl):
    """Prepares texts and splits them."""

    def make(texts, one_in=4, **kwargs):
        return split(prepare_texts(texts, **kwargs), write_jsonl(texts), share(one_in))

    return make


def documents(stream):
    """Returns the documents as tuples of ids, in the order of the stream."""
    tokens, starts = stream.read(0, stream.tokens)
    parts = [tuple(part.tolist()) for part in np.split(tokens, np.flatnonzero(starts))[1:]]
    assert stream.document_ends().tolist() == np.cumsum([len(p) for p in parts]).tolist()
    assert len(parts) == stream.documents
    return parts


def test_each_document_is_on_one_side_with_its_bytes(sides, texts, tokenizer, capfd):
    both = sides(texts)
    ids = {tuple(tokenizer.encode(t, bos=True, eos=True)): len(t.encode()) for t in texts}
    parts = {side: documents(stream) for side, stream in both.items()}
    assert sorted(parts["train"] + parts["held_out"]) == sorted(ids)
    for side, stream in both.items():
        assert stream.bytes == sum(ids[d] for d in parts[side])
    said = "source texts: {0.documents} documents, {0.bytes:,} bytes for training; {1.documents}"
    assert said.format(*both.values()) in capfd.readouterr().err


def test_a_documents_side_depends_on_its_text_alone(sides, texts, tmp_path):
    wanted = set(documents(sides(texts)["held_out"]))
    for name, other, options in (
        ("order", texts[::-1], {}),
        ("shards", texts, {"shards": 7, "block_tokens": 9}),
        ("fewer", texts[20:], {}),
        ("twice", texts * 2, {}),
    ):
        both = sides(other, folder=str(tmp_path / name), **options)
        held_out = documents(both["held_out"])
        assert set(held_out) == wanted & set(held_out + documents(both["train"]))
        assert not set(held_out) & set(documents(both["train"]))


def test_the_first_eight_bytes_of_the_sha_256_decide(sides, texts, tokenizer):
    held_out = [tokenizer.decode(d) for d in documents(sides(texts, one_in=10)["held_out"])]
    first = {t: int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) for t in texts}
    assert sorted(held_out) == sorted(t for t, number in first.items() if number % 10 == 0)


def test_any_part_of_a_side_can_be_read_and_packed(sides, texts):
    for stream in sides(texts, one_in=3, block_tokens=7).values():
        tokens, starts = stream.read(0, stream.tokens)
        for start, length in itertools.product(range(0, stream.tokens, 11), (0, 1, 30)):
            stop = min(start + length, stream.tokens)
            part, part_starts = stream.read(start, stop)
            assert part.tolist() == tokens[start:stop].tolist()
            assert part_starts.tolist() == starts[start:stop].tolist()
        for rows in (CutRows(stream, 16), WholeRows(stream, 150, "error")):
            scored = [
                t for i in range(len(rows)) for t in rows[i]["tokens"][rows[i]["weights"] > 0]
            ]
            assert sorted(scored) == sorted(tokens[~starts])


def test_a_document_keeps_its_number_in_the_source(sides, texts, tokenizer):
    for stream in sides(texts, shards=7).values():
        numbers = [stream.number(i) for i in range(stream.documents)]
        assert [tokenizer.decode(d) for d in documents(stream)] == [texts[n - 1] for n in numbers]


def test_a_side_without_documents_is_an_error_whose_advice_works(sides, texts, tmp_path):
    with pytest.raises(
        UserError, match=r"one_in=99: source texts has no document to hold out"
    ) as e:
        sides(texts[:5], one_in=99)
    sides(texts[:5], one_in=int(str(e.value).partition("set one_in to ")[2]))
    with pytest.raises(UserError, match=r"\(different documents in it: 1\); give it more") as e:
        sides(texts[:1] * 9, one_in=2, folder=str(tmp_path / "equal"))
    assert "\n" not in str(e.value)


def test_one_file_is_one_document_and_a_separator_is_proposed(tmp_path, prepare_texts, texts):
    source = TextSource(kind="text", files=(str(tmp_path / "a.txt"),))
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    config = changed(tmp_path, source)
    with pytest.raises(UserError, match=r"set its separator, such as \"\\n\\n\""):
        open_data(config, open_tokenizer(config))
    config = changed(tmp_path, dataclasses.replace(source, separator="\n---\n"))
    with pytest.raises(UserError, match=r"; correct its separator, such as \"\\n\\n\""):
        open_data(config, open_tokenizer(config))
    config = changed(tmp_path, dataclasses.replace(source, separator="\n\n"))
    data = open_data(config, open_tokenizer(config))
    assert data.sources["a"].documents + data.held_out["a"].documents == len(texts)


def test_the_recipe_for_own_text_in_the_docs_holds_out_a_share_of_one_file(
    tmp_path, texts, monkeypatch
):
    page = configs.configs_folder().parent / "docs" / "data.md"
    (tmp_path / "mine.yaml").write_text(re.search(r"```yaml\n(.*?)```", page.read_text(), re.S)[1])
    (tmp_path / "mine.txt").write_text("\n\n".join(texts))
    monkeypatch.chdir(tmp_path)
    config = configs.load("mine.yaml", ["tokenizer.vocab_size=300"])
    data = open_data(config, open_tokenizer(config))
    assert data.sources["mine"].documents > data.held_out["mine"].documents > 0
    assert len(data.held_out_rows["mine"])


def changed(folder, *sources, one_in=4, **data):
    """A recipe that holds out a share of sources, which are named a, b, ..."""
    whole = configs.to_dict(configs.load(recipes.on_disk(folder)))
    named = [
        {"name": n, "source": configs.to_dict(s)} for n, s in zip("abc", sources, strict=False)
    ]
    whole["tokenizer"] = {"kind": "train", "vocab_size": 300}
    whole["data"] |= {"train": named, "held_out": {"from": "train", "one_in": one_in}, **data}
    return configs.validate(Config, whole, "recipe")


def test_a_recipe_holds_out_a_share_of_each_source(tmp_path, write_jsonl, texts, monkeypatch):
    sources = [write_jsonl(texts[:40], "first").source, write_jsonl(texts[20:], "second").source]
    config = changed(tmp_path, *sources)
    tokenizer = open_tokenizer(config)
    data = open_data(config, tokenizer)
    assert data.held_out.keys() == data.held_out_rows.keys() == {"a", "b"}
    unseen = {d for stream in data.held_out.values() for d in documents(stream)}
    seen = {d for stream in data.sources.values() for d in documents(stream)}
    assert unseen and not unseen & seen  # no text of both sources is on two sides
    assert len(unseen | seen) == len(texts)
    # Another share, packing or length prepares nothing.
    monkeypatch.setattr("jllama.data.prepare._make", None)
    open_data(changed(tmp_path, *sources, one_in=7, length=40), tokenizer)
    assert data.held_out["a"].digest == open_data(config, tokenizer).held_out["a"].digest


def test_a_trained_tokenizer_sees_no_text_that_is_held_out(
    tmp_path, write_jsonl, texts, monkeypatch
):
    source = write_jsonl(texts)
    config = changed(tmp_path, source.source)
    given = []
    train = "jllama.data.opening.train_sentencepiece"
    monkeypatch.setattr(train, lambda texts, wanted: given.extend(texts) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_tokenizer(config)
    sides = [list(texts_of(config.data, side, source)) for side in ("train", "held_out")]
    assert given == sides[0] and sorted(sides[0] + sides[1]) == sorted(texts)
