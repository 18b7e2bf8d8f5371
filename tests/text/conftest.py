"""Tokenizers of every kind with two vocabularies: one of SentencePiece, one of bytes.

With JLLAMA_TEST_DATA they are Llama 2's and one of 8,000 ranks trained on real text. Without, both
are small and trained on the standard library.
"""

import os
from io import BytesIO
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizer_files import KINDS, added, merges, metaspace, template, tiktoken_file

from jllama.config import StdlibSource, TrainedTokenizer
from jllama.data.source import documents
from jllama.text.huggingface import HuggingFaceTokenizer
from jllama.text.llama3 import PATTERN, SPECIAL_TOKENS, TiktokenTokenizer
from jllama.text.spm import SentencePieceTokenizer
from jllama.text.tokenizer_json import LETTERS, spell
from jllama.text.vocabulary import train_sentencepiece

DATA = os.environ.get("JLLAMA_TEST_DATA")


@pytest.fixture(scope="session")
def data() -> Path:
    if not DATA:
        pytest.skip("JLLAMA_TEST_DATA is unset: no published tokenizer or text here")
    return Path(DATA)


@pytest.fixture(scope="session")
def library() -> list[str]:
    sources = [StdlibSource(kind="stdlib", split=split) for split in ("train", "held_out")]
    return [d.text for source in sources for d in documents(source)]


@pytest.fixture(scope="session")
def corpus(library) -> list[str]:
    """A few texts of real prose, or of code without JLLAMA_TEST_DATA."""
    if not DATA:
        return library[:40]
    return [p.read_text() for p in sorted(Path(DATA, "text").glob("*.txt"))]


@pytest.fixture(scope="session")
def trained(library) -> SentencePieceTokenizer:
    config = TrainedTokenizer(kind="train", vocab_size=2048, max_bytes=4_000_000)
    return train_sentencepiece(library, config)


@pytest.fixture(scope="session")
def spm_model(library) -> bytes:
    """A model like LLaMA's: it adds a space before the text and has byte fallback."""
    if DATA:
        return Path(DATA, "tokenizers", "llama2_tokenizer.model").read_bytes()
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in library[:40] for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=2000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=3,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def ranks(corpus) -> list[bytes]:
    """Pieces of byte-level BPE with Llama-3's pattern, by rank."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8_192 if DATA else 2_000,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    vocab = bpe.get_vocab()
    return [bytes(LETTERS[c] for c in piece) for piece in sorted(vocab, key=vocab.__getitem__)]


@pytest.fixture(scope="session")
def llama3_model(ranks) -> bytes:
    return tiktoken_file(ranks)


@pytest.fixture(scope="session")
def byte_json(ranks) -> dict:
    """A tokenizer.json like Llama 3's."""
    vocab = {spell(piece): i for i, piece in enumerate(ranks)}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    byte_level = {"type": "ByteLevel"} | byte_level
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(t, len(ranks) + i) for i, t in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level],
        },
        "post_processor": template({SPECIAL_TOKENS[0]: len(ranks)}),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": merges(vocab),
        },
    }


@pytest.fixture(scope="session")
def spm_json(spm_model) -> dict:
    """A tokenizer.json like Llama 2's: its normaliser adds the space before a text."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=spm_model)
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    plain = [
        i for i in vocab.values() if not (sp.is_control(i) or sp.is_byte(i) or sp.is_unknown(i))
    ]
    pieces = {sp.id_to_piece(i): -sp.get_score(i) for i in plain}
    steps = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(t, i) for i, t in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": template({"<s>": 1}),
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges(pieces),
        },
    }


@pytest.fixture(scope="session")
def made(trained, spm_model, llama3_model, byte_json, spm_json):
    """A tokenizer of each of KINDS."""
    return {
        "trained": trained,
        "spm": SentencePieceTokenizer(spm_model),
        "llama3": TiktokenTokenizer(llama3_model),
        "json_bytes": HuggingFaceTokenizer(byte_json),
        "json_prepend": HuggingFaceTokenizer(spm_json),
        "json_first": HuggingFaceTokenizer(metaspace(spm_json, "first")),
        "json_always": HuggingFaceTokenizer(metaspace(spm_json, "always")),
    }


@pytest.fixture(params=KINDS)
def tokenizer(request, made):
    return made[request.param]
