"""Every tokenizer beside the library that it comes from, and as transformers loads our export.

On real text, on strings made to be hard, and on random characters.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import jllama
from jllama import cli
from tests.tiny import llama2_c_tokenizer

DATA = os.environ.get("JLLAMA_TEST_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="JLLAMA_TEST_DATA is unset: no real text")
MODELS = {"Llama-2": "llama2_tokenizer.model", "Chinese": "chinese_sp.model"}
RANKS = 8192
BPE = f"BPE, {RANKS:,} ranks"
SMALL = "llama2.c, 512 pieces"  # stories260K's kind: SentencePiece's normaliser as it is by default
VOCABULARIES = [*MODELS, BPE, SMALL]
# The Chinese model is a unigram one, which no LLaMA has alone, and no tokenizer.json expresses it.
EXPORTED = ["Llama-2", BPE, SMALL]
READERS = ["transformers fast", "transformers4 fast", "transformers4 slow"]
HARD = [
    "",
    " ",
    "  ",
    "   leading and trailing   ",
    "\n",
    "\t\n \r\n\r \n\n\n  x",
    "a\x00b\x01\x7f\x85",
    "1 12 123 1234 12345 1234567890 ٣٤٥٦ ⅷⅸ ²³",
    "I'LL we'Ll it's 'S 'ſ 'T'RE 'd'D’s",
    "nbsp\u00a0\u2003wide\u3000zero\u200bwidth\u2060",
    "\ufeffbom \ufffd \U0010ffff \ue000",
    "e\u0301 é ﬁ İ ẞ ǆ 한글 각",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽",
    "北京是中国的首都。「引用」……——，",
    "مرحبا بالعالم שלום नमस्ते ไทย",
    "def f(x):\n\treturn {'a': [1, 2]}  # !!!\n\n\n    pass\n",
    "...\n\n---\n!?!?\r\n\r\n",
    "a" * 3000,
    " " * 3000 + "x",
    "\n" * 3000,
    "ab " * 2000,
    "!" * 3000 + "\n",
    "1" * 3000,
    "中" * 3000,
    "[INST] <<SYS>> [/INST] <0x0A> <|notaspecial|> <pad>",
]
# Special tokens' names: transformers makes tokens of them, sentencepiece and tiktoken do not.
NAMES = ["<s>", "a</s>b<unk>", "<|begin_of_text|>x<|eot_id|>"]
# Longer than what is cut for tiktoken's sake.
LONG = ["x" + " " * 150_000 + "y", "!" + "\n" * 120_000 + " " * 120_000 + "z", "\t" * 200_000]


def _texts() -> list[str]:
    """Lines, and a longer piece, of every file; hard strings; names; random characters."""
    texts = []
    for file in sorted((Path(DATA) / "text").iterdir()):
        text = file.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines(keepends=True)
        texts += [*lines[:: len(lines) // 200], text[1000:21_000]]
    return texts + HARD + NAMES + _random(200)


def _random(count: int) -> list[str]:
    """Strings of Unicode scalar values, from the whole of it or from a narrow range."""
    rng = np.random.default_rng(0)
    ranges = [(0, 0x80), (0, 0x800), (0x2000, 0x2100), (0x4E00, 0x9FFF), (0, 0x110000)]
    out = []
    for i in range(count):
        low, high = ranges[i % len(ranges)]
        points = rng.integers(low, high, rng.integers(1, 40))
        out.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return out


def _files() -> list[str]:
    files = sorted((Path(DATA) / "text").iterdir())
    return [file.read_bytes().decode("utf-8", errors="replace") for file in files]


def _peers(run_peer, peer, kind, path, texts, folder) -> list[dict]:
    (folder / "texts.json").write_text(json.dumps(texts))
    job = {"kind": kind, "path": path, "texts": folder / "texts.json", "out": folder / "out.json"}
    run_peer(peer, "texts", [job], folder)
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def sources(run_peer, tmp_path_factory):
    """The tokenizer.model of each vocabulary."""
    bpe = tmp_path_factory.mktemp("bpe") / "tokenizer.model"
    files = sorted(map(str, (Path(DATA) / "text").iterdir()))
    job = {"kind": "train", "files": files, "ranks": RANKS, "path": bpe}
    run_peer("transformers", "texts", [job], bpe.parent)
    published = {name: Path(DATA) / "tokenizers" / file for name, file in MODELS.items()}
    small = tmp_path_factory.mktemp("small") / "tokenizer.model"
    small.write_bytes(llama2_c_tokenizer(_files()))
    return published | {BPE: bpe, SMALL: small}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_ids_and_text_of_the_library_itself(vocabulary, sources, run_peer, tmp_path, measured):
    path = sources[vocabulary]
    kind = "tiktoken" if vocabulary == BPE else "sentencepiece"
    mark = "\u2581" if vocabulary == "Llama-2" else " "
    # A unigram model's float32 scores of a whole file are rounded, and ties fall another way.
    length = 100_000 if vocabulary == "Chinese" else None
    texts = _texts() + [text[:length] for text in _files()]
    texts += LONG if vocabulary == BPE else []
    tokenizer = jllama.load_tokenizer(path)
    theirs = _peers(run_peer, "transformers", kind, path, texts, tmp_path)
    wrong = []
    for text, their in zip(texts, theirs, strict=True):
        ids = tokenizer.encode(text)
        same = ids == their["ids"] and tokenizer.encode(text, bos=True) == their["whole"]
        back = tokenizer.decode(ids)
        # For an unknown character sentencepiece has a mark, and jllama nothing.
        same &= back == their["text"] or (vocabulary == "Chinese" and 0 in ids)
        # These two normalise, and are no inverse of anything.
        exact = vocabulary not in ("Chinese", SMALL)
        if not same or (exact and back != text.replace(mark, " ")):
            wrong.append((text[:80], ids[:80], their["ids"][:80], back[:80]))
    measured(f"{vocabulary}: texts that differ", f"jllama, {kind}", len(wrong) / len(texts))
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[0]}"


@pytest.fixture(scope="module")
def exported(sources, run_peer, tmp_path_factory):
    """Hugging Face folders that jllama wrote, of a small model with each vocabulary."""
    folders = {}
    for name in EXPORTED:
        path = sources[name]
        folder = tmp_path_factory.mktemp("export")
        config = {
            "vocab_size": jllama.load_tokenizer(path).vocab_size,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "rope": {"rope_type": "default", "rope_theta": 1e4},
        }
        job = {"folder": folder / "source", "out": folder / "x.npz", "ids": [1], "positions": [0]}
        make = {"make": {"config": config, "std": 0.02}, "seed": 0}
        run_peer("transformers", "models", [job | make], folder)
        shutil.copy(path, folder / "source" / "tokenizer.model")
        for source, target in (("source", "jllama"), ("jllama", "hf")):
            args = [str(folder / source), str(folder / target), "--to", target]
            assert cli.main(["convert", *args]) == 0
        folders[name] = folder
    return folders


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("vocabulary", EXPORTED)
def test_our_export_as_transformers_loads_it(
    vocabulary, reader, exported, sources, run_peer, tmp_path, measured
):
    if vocabulary == BPE and "slow" in reader:
        pytest.skip("transformers has no slow tokenizer for tiktoken's files")
    peer, kind = reader.split()
    texts = _texts()
    tokenizer = jllama.load_tokenizer(sources[vocabulary])
    theirs = _peers(run_peer, peer, kind, exported[vocabulary] / "hf", texts, tmp_path)
    wrong = [
        (text, ids, their["ids"])
        for text, their in zip(texts, theirs, strict=True)
        if (ids := tokenizer.encode(text, special=True)) != their["ids"]
        or tokenizer.encode(text, bos=True, special=True) != their["whole"]
        or tokenizer.decode(ids) != their["text"]
    ]
    measured(f"{vocabulary}: texts that differ", f"jllama → {reader}", len(wrong) / len(texts))
    assert not wrong, f"{len(wrong)} of {len(texts)}: {str(wrong[0])[:1000]}"


@pytest.mark.parametrize("vocabulary", EXPORTED)
def test_our_export_as_we_load_it(vocabulary, exported):
    before = jllama.load_tokenizer(exported[vocabulary] / "source")  # with its stop ids
    for folder in ("jllama", "hf"):
        after = jllama.load_tokenizer(exported[vocabulary] / folder)
        for name in ("vocab_size", "bos_id", "eos_id", "stop_ids", "special_tokens"):
            assert getattr(after, name) == getattr(before, name), name
        for text in _texts():
            ids = before.encode(text, special=True)
            assert after.encode(text, special=True) == ids
            assert after.decode(ids) == before.decode(ids)
