"""A tiny tokenizer and a way to prepare a few texts."""

import json

import pytest

from jllama.config import JsonlSource, PrepareConfig, SourceConfig, TrainedTokenizer
from jllama.data.prepare import prepare
from jllama.text.vocabulary import train_sentencepiece

TEXTS = [f"number {i}:\n    " + "one two three " * (i % 7) + f"end {i * i}\n" for i in range(60)]


@pytest.fixture(scope="session")
def texts():
    return TEXTS


@pytest.fixture(scope="session")
def tokenizer():
    return train_sentencepiece(TEXTS * 20, TrainedTokenizer(kind="train", vocab_size=305))


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes texts as JSON lines and returns their source."""

    def write(texts, name="texts", **kwargs):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        return SourceConfig(
            name=name, source=JsonlSource(kind="jsonl", files=(str(path),)), **kwargs
        )

    return write


@pytest.fixture
def prepare_texts(tmp_path, tokenizer, write_jsonl):
    """Prepares texts, in this process unless `workers` is given."""

    def make(texts=TEXTS, name="texts", **kwargs):
        options = {"folder": str(tmp_path / "prepared"), "workers": 1, "shards": 3}
        options |= {"block_tokens": 50} | kwargs
        return prepare(write_jsonl(texts, name), tokenizer, PrepareConfig(**options))

    return make
