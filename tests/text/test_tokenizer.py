"""The tokenizer gives every text back, whole and streamed."""

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllama.config import StdlibSource, TrainedTokenizer
from jllama.data.source import documents
from jllama.errors import UserError
from jllama.text.tokenizer import load_tokenizer
from jllama.text.vocabulary import train_sentencepiece

LIBRARY = [StdlibSource(kind="stdlib", split=split) for split in ("train", "held_out")]
UNICODE = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c != 0x2581]


def train(texts, **kwargs):
    return train_sentencepiece(texts, TrainedTokenizer(kind="train", **kwargs))


@pytest.fixture(scope="module")
def library():
    return [d.text for source in LIBRARY for d in documents(source)]


@pytest.fixture(scope="module")
def trained(library):
    return train(library, vocab_size=2048, max_bytes=4_000_000)


@pytest.fixture(scope="module")
def published():
    folder = os.environ.get("JLLAMA_TEST_DATA")
    if not folder:
        pytest.skip("JLLAMA_TEST_DATA is unset: no Llama-2 tokenizer here")
    return load_tokenizer(Path(folder) / "tokenizers" / "llama2_tokenizer.model")


@pytest.fixture(params=["trained", "published"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_every_library_file_round_trips(trained, library):
    for text in library:
        assert trained.decode(trained.encode(text, bos=True, eos=True)) == text


def test_every_unicode_character_round_trips(tokenizer):
    for start in range(0, len(UNICODE), 4096):
        text = "".join(UNICODE[start : start + 4096])
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for letter in UNICODE[::97] + UNICODE[:300]:
        assert tokenizer.decode(tokenizer.encode(letter)) == letter


def test_the_space_mark_is_the_one_exception(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_round_trips_whole_and_streamed(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    stream = trained.stream()
    assert "".join([stream.feed(i) for i in ids]) + stream.end() == text


@pytest.mark.parametrize(
    "text",
    ["", " ", "  a", "\n", "\r\n\t x\r", "\0", "a\0b", "<s></s><unk>", "<0x41>", "é 世界 🎉"],
)
def test_odd_texts_round_trip_without_control_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 2047)))
def test_a_stream_is_decode_and_never_cuts_a_character(trained, ids):
    stream = trained.stream()
    parts = [stream.feed(i) for i in ids]
    assert "".join(parts) + stream.end() == trained.decode(ids)
    valid = trained.encode("🎉é世")
    stream = trained.stream()
    assert all("\ufffd" not in stream.feed(i) for i in valid)


def test_a_stream_after_a_prompt_keeps_the_space(published):
    ids = published.encode("hello world")
    assert published.decode(ids) == "hello world"
    stream = published.stream(after=ids[:1])
    assert "".join([stream.feed(i) for i in ids[1:]]) + stream.end() == " world"


def test_llama2_ids_are_the_published_ones(published):
    assert published.encode("Hello world", bos=True) == [1, 15043, 3186]
    assert (published.vocab_size, published.bos_id, published.eos_id) == (32000, 1, 2)


def test_ids_outside_the_vocabulary_are_an_error(trained):
    for bad in (-1, trained.vocab_size):
        with pytest.raises(UserError, match=f"token {bad}"):
            trained.decode([bad])


def test_unpaired_surrogates_are_an_error(trained):
    with pytest.raises(UserError, match="U\\+D800 at character 2"):
        trained.encode("ab\ud800")


def test_saving_loading_and_pickling_keep_it(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.model")
    for other in (
        load_tokenizer(tmp_path),
        load_tokenizer(tmp_path / "tokenizer.model"),
        pickle.loads(pickle.dumps(trained)),
    ):
        assert other.digest == trained.digest
        assert other.encode("def f(x):\n    return x\n") == trained.encode(
            "def f(x):\n    return x\n"
        )


def test_missing_and_broken_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such"):
        load_tokenizer(tmp_path / "none.model")
    for content in (b"", b"not a model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.model: not a SentencePiece model") as e:
            load_tokenizer(tmp_path / "bad.model")
        assert "\n" not in str(e.value)


def test_long_texts_are_cut_without_a_trace(tokenizer, library, monkeypatch):
    text = "\n".join(library[:3])
    whole = tokenizer.encode(text)
    monkeypatch.setattr("jllama.text.tokenizer._PART", 100)
    assert tokenizer.encode(text) == whole
    assert tokenizer.decode(whole) == text
