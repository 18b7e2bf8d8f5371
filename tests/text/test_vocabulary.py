"""Training a vocabulary."""

import re

import pytest

from jllama.config import TrainedTokenizer
from jllama.errors import UserError
from jllama.text.vocabulary import train_sentencepiece

CODE = "def area(width, height):\n    if width:\n        return width * height\n    return 12\n\n\n"
TEXTS = [CODE.replace("area", f"area_{w}") for w in ("of", "in", "by", "on", "at")] * 20


def config(**kwargs):
    return TrainedTokenizer(**{"kind": "train", "vocab_size": 320} | kwargs)


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


@pytest.mark.parametrize("cross_words", [False, True])
def test_training_is_deterministic(cross_words):
    wanted = config(cross_words=cross_words)
    assert (
        train_sentencepiece(TEXTS, wanted).digest == train_sentencepiece(iter(TEXTS), wanted).digest
    )


def test_a_line_break_with_its_indentation_is_one_piece():
    known = pieces(train_sentencepiece(TEXTS, config()), CODE)
    assert "\n    " in known and "\n        " in known


def test_digits_are_split_and_words_are_not_crossed():
    tokenizer = train_sentencepiece(TEXTS * 10, config())
    assert pieces(tokenizer, "1234") == list("1234")
    assert all(" " not in p.strip() for p in pieces(tokenizer, CODE))
    crossing = train_sentencepiece(TEXTS * 10, config(cross_words=True))
    assert any(" " in p.strip() for p in pieces(crossing, CODE))


def test_characters_without_room_are_spelt_in_bytes():
    text = "".join(chr(0x4E00 + i) for i in range(2000))
    tokenizer = train_sentencepiece([text], config(vocab_size=300))
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_max_bytes_are_read():
    read = []

    def texts():
        for text in TEXTS:
            read.append(text)
            yield text

    train_sentencepiece(texts(), config(max_bytes=sum(map(len, TEXTS[:50]))))
    assert len(read) == 50


def test_too_little_text_is_one_line(capfd):
    with pytest.raises(UserError, match=r"vocab_size=5000.*only \d+ pieces") as e:
        train_sentencepiece(TEXTS, config(vocab_size=5000))
    assert "\n" not in str(e.value)
    number = int(re.search(r"only (\d+) pieces; lower it to that number", str(e.value))[1])
    assert train_sentencepiece(TEXTS, config(vocab_size=number)).vocab_size == number
    with pytest.raises(UserError, match=r"--size=320: .*only 26\d pieces; give more text"):
        train_sentencepiece(["a"], config(), "--size")
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([], config())
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([""], config())
