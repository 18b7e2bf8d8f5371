"""`tokenizers` reads our tokenizer.json and gives our ids and our texts."""

import base64
import itertools
import json
import os
import struct
from pathlib import Path

import pytest
import tiny
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from jllama.config import StdlibSource, TrainedTokenizer
from jllama.data.source import documents
from jllama.interop.hf_tokenizer import export_note, tokenizer_files
from jllama.text.added import AddedToken
from jllama.text.llama3 import PATTERN
from jllama.text.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    load_tokenizer,
)
from jllama.text.vocabulary import train_sentencepiece

SCALARS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
# Fields of normalizer_spec; in a message later ones win: remove_extra_whitespaces = true, and
# add_dummy_prefix = false.
EXTRA_SPACES, NO_PREFIX = b"\x1a\x02\x20\x01", b"\x1a\x02\x18\x00"
NASTY = [
    "", " ", "  ", " a", "  a b", "a ", "\n", "\n\n\n    x", "\r\n\t x\r", "\0", "a\0b", "\t\t",
    "\u2581", "a\u2581\u2581b", "\u2581 a", "<0x41>", "</s>", "<s> <unk>", "a<s>b", "<0x0A>\n",
    "<|begin_of_text|>", "a<|eot_id|> b", "世界 🎉", "é", "e\u0301", "\ufeffa", "\ufffd",
    "don't DON'T 'ſ 'K", "1234567", "x" * 300, "ab" * 150, "aba" * 100, "    " * 30 + "return",
    "\n    " * 50,
    "\r\n \n\u00a0\u3000\u2028 x", "..,,!!\n\n\n", "a\u200db", "\U0010ffff",
]  # fmt: skip
NASTY += [letter * n for letter in " \na-=." for n in range(1, 90)]


def read(tokenizer):
    """What `tokenizers` makes of the files, with special tokens' texts as text."""
    made = tokenizers.Tokenizer.from_str(tokenizer_files(tokenizer)["tokenizer.json"].decode())
    made.encode_special_tokens = True
    return made


def assert_same(ours, theirs, texts, decoded=True):
    texts = list(texts)
    for text, encoding in zip(texts, theirs.encode_batch(texts), strict=True):
        ids = ours.encode(text, bos=True)
        assert encoding.ids == ids, repr(text[:80])
        if decoded:
            assert theirs.decode(ids) == ours.decode(ids), repr(text[:80])


@pytest.fixture(scope="module")
def library():
    return [d.text for d in documents(StdlibSource(kind="stdlib", split="held_out"))]


@pytest.fixture(scope="module")
def data():
    folder = os.environ.get("JLLAMA_TEST_DATA")
    if not folder:
        pytest.skip("JLLAMA_TEST_DATA is unset: no texts and published tokenizers here")
    return Path(folder)


@pytest.fixture(scope="module")
def texts(data):
    files = [*sorted((data / "text").iterdir()), data / "instruction" / "alpaca_zh_demo.json"]
    return [file.read_text()[:200_000] for file in files]


def train(library, **kwargs):
    config = TrainedTokenizer(kind="train", vocab_size=2048, max_bytes=1_000_000, **kwargs)
    return train_sentencepiece(library, config)


def byte_level(texts, vocab_size=8000):
    """A tiktoken file with ranks learnt from `texts`."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    # The bytes that print have their own letters, the others those from U+0100 on.
    others = [b for b in range(256) if chr(b) not in alphabet]
    byte = {chr(b): b for b in range(256)} | {chr(0x100 + i): b for i, b in enumerate(others)}
    tokens = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return tiktoken_of(bytes(byte[letter] for letter in token) for token, _ in tokens)


def tiktoken_of(pieces):
    lines = [base64.b64encode(piece) + b" %d\n" % i for i, piece in enumerate(pieces)]
    return TiktokenTokenizer(b"".join(lines))


@pytest.fixture(scope="module")
def trained(library):
    return train(library)


@pytest.fixture(scope="module")
def crossing(library):
    return train(library, cross_words=True)


@pytest.fixture(scope="module")
def llama2(data):
    return SentencePieceTokenizer((data / "tokenizers" / "llama2_tokenizer.model").read_bytes())


@pytest.fixture(scope="module")
def tiktoken(library):
    return byte_level([*library[::3], *("".join(SCALARS[i::97]) for i in range(3))])


@pytest.fixture(scope="module")
def squeezing(llama2):
    """Removes spaces at both ends and repeated ones, as SentencePiece does unless told not to."""
    return SentencePieceTokenizer(llama2.model + EXTRA_SPACES)


@pytest.fixture(scope="module")
def squeezing_bare(llama2):
    """The same without a space before the text."""
    return SentencePieceTokenizer(llama2.model + NO_PREFIX + EXTRA_SPACES)


@pytest.fixture(scope="module")
def small(library):
    """Of stories260K's kind, which removes extra spaces too."""
    return SentencePieceTokenizer(tiny.llama2_c_tokenizer(library))


@pytest.fixture(
    scope="module",
    params=["trained", "crossing", "llama2", "tiktoken", "squeezing", "squeezing_bare", "small"],
)
def pair(request):
    tokenizer = request.getfixturevalue(request.param)
    return tokenizer, read(tokenizer)


def test_strings_made_to_be_hard(pair):
    assert_same(*pair, NASTY)


def test_every_unicode_scalar(pair):
    chunks = ["".join(SCALARS[i : i + 997]) for i in range(0, len(SCALARS), 997)]
    assert_same(*pair, chunks[:60])
    assert_same(*pair, chunks[60:], decoded=False)  # most of them unassigned
    assert_same(*pair, [f"a{letter} {letter}1" for letter in SCALARS[:0x800]])


def test_texts_of_the_standard_library(pair, library):
    assert_same(*pair, library[::8])


def test_real_texts(pair, texts):
    assert_same(*pair, texts)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text(" \n\tab\u2581<s>0x1'") | st.text("ab "))
def test_any_text(pair, text):
    assert_same(*pair, [text])


def test_our_reader_of_tokenizer_json_gives_the_same_ids(pair, texts, tmp_path):
    ours, _ = pair
    if ours.decode(ours.encode("a  b")) == "a b":
        pytest.skip("our reader refuses a tokenizer.json that does not give the text back")
    for name, data in tokenizer_files(ours).items():
        if name != "tokenizer.model":
            (tmp_path / name).write_bytes(data)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, HuggingFaceTokenizer)
    for text in [*NASTY, *texts, "\n    a", "\n\u2581\u2581\u2581\u2581a", "if x:\n\n        y"]:
        ids = ours.encode(text)
        assert again.encode(text) == ids, text[:80]
        assert again.decode(ids) == ours.decode(ids), text[:80]


def test_special_tokens_are_found_in_the_text_as_ours_are_when_asked(pair):
    ours, theirs = pair
    theirs.encode_special_tokens = False
    try:
        for text in [*ours.special_tokens, *(f"a {t} b" for t in ours.special_tokens)]:
            assert theirs.encode(text).ids == ours.encode(text, bos=True, special=True), text
    finally:
        theirs.encode_special_tokens = True


def test_a_piece_comes_from_the_last_merge_of_the_piece_alone():
    pieces = [bytes([b]) for b in range(256)] + [b"aa", b"aaa", b"aba", b"ab", b"abab", b"ba"]
    tokenizer = tiktoken_of(pieces)
    model = json.loads(tokenizer_files(tokenizer)["tokenizer.json"])["model"]
    assert ["aa", "a"] in model["merges"]
    assert ["a", "aa"] not in model["merges"]
    words = ["".join(w) for n in range(1, 11) for w in itertools.product("ab", repeat=n)]
    assert_same(tokenizer, read(tokenizer), words)


@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(st.text("ab", min_size=2, max_size=5), unique=True))
def test_any_ranks_merge_as_in_tiktoken(pieces):
    tokenizer = tiktoken_of([bytes([b]) for b in range(256)] + [p.encode() for p in pieces])
    words = ["".join(w) for n in (6, 9) for w in itertools.product("ab", repeat=n)]
    assert_same(tokenizer, read(tokenizer), words)


def joined(model, pieces):
    """A SentencePiece model with more pieces: text -> score."""
    for text, score in pieces.items():
        body = b"\x0a" + bytes([len(text.encode())]) + text.encode()
        body += b"\x15" + struct.pack("<f", score)
        model += b"\x0a" + bytes([len(body)]) + body
    return model


@pytest.mark.parametrize("legacy", [True, False])
def test_added_tokens(llama2, legacy):
    first = llama2.vocab_size
    added = [
        AddedToken("[PAD]", first),
        AddedToken("<img>", first + 3, special=False),
        AddedToken("  ~~", first + 4, special=False, normalized=True),
    ]
    ours = SentencePieceTokenizer(llama2.model, added=added, legacy=legacy)
    theirs = read(ours)
    texts = [*NASTY, "a<img>b", "<img> a", " <img>  a <img>", "[PAD] a", "x  ~~ y", "\u2581a<img>a"]
    assert_same(ours, theirs, texts)
    theirs.encode_special_tokens = False
    for text in ("[PAD] a", "a[PAD]a", "</s> a"):
        assert theirs.encode(text).ids == ours.encode(text, bos=True, special=True)


def test_tokens_that_other_files_add_to_a_tokenizer_json_are_written(llama2):
    plain = json.loads(tokenizer_files(llama2)["tokenizer.json"])
    first = llama2.vocab_size
    added = [AddedToken("[PAD]", first), AddedToken("<img>", first + 3, special=False)]
    ours = HuggingFaceTokenizer(plain, added=added, special=["the"])
    files = tokenizer_files(ours)
    again = HuggingFaceTokenizer(json.loads(files["tokenizer.json"]))
    assert again.vocab_size == ours.vocab_size == first + 4
    assert again.special_tokens == ours.special_tokens
    assert "the" in again.special_tokens
    decoder = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert {"[PAD]", "<img>", "the"} <= {token["content"] for token in decoder.values()}
    theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in ("a<img>b", "[PAD] a<img>", "the"):
        ids = ours.encode(text, bos=True, special=True)
        assert again.encode(text, bos=True, special=True) == ids == theirs.encode(text).ids
    # What nothing is added to stays what it was.
    assert json.loads(tokenizer_files(HuggingFaceTokenizer(plain))["tokenizer.json"]) == plain


def test_pieces_of_one_score_differ_only_where_they_overlap(llama2):
    assert export_note(llama2) is None
    apart = SentencePieceTokenizer(
        joined(llama2.model, {"世界和平": 0.0, "世界": 0.0, "和平": 0.0})
    )
    assert_same(apart, read(apart), ["世界", "世界和平", "和平世界和平和世界 a"])
    ours = SentencePieceTokenizer(joined(llama2.model, {"平世": 0.0, "和平": 0.0}))
    theirs = read(ours)
    assert "share their score" in export_note(ours)
    assert_same(ours, theirs, ["和平", "平世", "平世和", "和平 平世"])
    ids, others = ours.encode("和平世", bos=True), theirs.encode("和平世").ids
    assert ids != others  # the leftmost there, the first of the list here
    assert ours.decode(ids) == ours.decode(others) == "和平世"


def test_a_tokenizer_json_is_written_unchanged(tiktoken):
    first = json.loads(tokenizer_files(tiktoken)["tokenizer.json"])
    files = tokenizer_files(HuggingFaceTokenizer(first))
    assert json.loads(files["tokenizer.json"]) == first
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_tokenizer_config_has_what_transformers_needs(llama2, tiktoken):
    files = tokenizer_files(llama2)
    assert files["tokenizer.model"] == llama2.model
    config = json.loads(files["tokenizer_config.json"])
    assert [config[f"{name}_token"] for name in ("bos", "eos", "unk")] == ["<s>", "</s>", "<unk>"]
    assert config["add_bos_token"] and not config["add_eos_token"]
    assert not config["clean_up_tokenization_spaces"]
    assert "token_type_ids" not in config["model_input_names"]
    assert set(tokenizer_files(tiktoken)) == files.keys() - {"tokenizer.model"}


def test_a_tokenizer_that_no_tokenizer_json_expresses_has_its_model_alone(data, tmp_path):
    chinese = SentencePieceTokenizer(
        (data / "tokenizers" / "chinese_sp.model").read_bytes(), adds_bos=False
    )
    files = tokenizer_files(chinese)
    assert "tokenizer.json" not in files and files["tokenizer.model"] == chinese.model
    assert "the model is not of type BPE" in export_note(chinese)
    config = json.loads(files["tokenizer_config.json"])
    assert (config["tokenizer_class"], config["unk_token"]) == ("LlamaTokenizer", "<unk>")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    again = load_tokenizer(tmp_path)
    assert again.encode("人工智能 AI") == chinese.encode("人工智能 AI")
    assert not again.adds_bos


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_a_text_gets_the_ends_that_the_tokenizer_adds(trained, bos, eos):
    ours = SentencePieceTokenizer(trained.model, adds_bos=bos, adds_eos=eos)
    files = tokenizer_files(ours)
    config = json.loads(files["tokenizer_config.json"])
    assert (config["add_bos_token"], config["add_eos_token"]) == (bos, eos)
    theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert theirs.encode("a b").ids == ours.encode("a b", bos=bos, eos=eos)
