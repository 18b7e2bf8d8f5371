"""Tokenizers of the peers: sentencepiece, tiktoken, and transformers' on a folder.

    python -m tests.peers.scripts.texts JOBS.json

Each job of the JSON list has a `kind` and a `path`. Its `texts` is a JSON file of strings; `out`
gets, for each, its `ids` without special tokens, the `text` that those decode to, and the `whole`
ids with special tokens where the kind has them. `train` writes a tiktoken file from `files`.
"""

import base64
import json
import sys
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers
import transformers
from tiktoken.load import load_tiktoken_bpe
from tokenizers import models, pre_tokenizers, trainers

# Llama-3's.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(job: dict) -> None:
    """`ranks` pieces from the text of `files`: 256 bytes, and merges in the order learnt."""
    model = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=job["ranks"], initial_alphabet=alphabet, show_progress=False
    )
    model.train(job["files"], trainer)
    of = {char: bytes([byte]) for char, byte in _bytes_of_chars().items()}
    vocab = sorted(model.get_vocab().items(), key=lambda item: item[1])
    pieces = [b"".join(of[char] for char in piece) for piece, _ in vocab]
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)]
    Path(job["path"]).write_bytes(b"".join(lines))


def _bytes_of_chars() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: printable ones themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    return dict(zip(chars, printable + others, strict=True))


def with_sentencepiece(path: str, texts: list[str]) -> list[dict]:
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    ids = [model.encode(text) for text in texts]
    return [{"ids": i, "text": model.decode(i), "whole": [model.bos_id(), *i]} for i in ids]


def with_tiktoken(path: str, texts: list[str]) -> list[dict]:
    ranks = load_tiktoken_bpe(path)
    model = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    ids = [model.encode_ordinary(text) for text in texts]
    return [{"ids": i, "text": model.decode(i), "whole": [len(ranks), *i]} for i in ids]


def with_transformers(path: str, texts: list[str], fast: bool) -> list[dict]:
    model = transformers.AutoTokenizer.from_pretrained(path, use_fast=fast)
    out = []
    for text in texts:
        ids = model.encode(text, add_special_tokens=False)
        back = model.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        out.append({"ids": ids, "text": back, "whole": model.encode(text)})
    return out


def main(jobs: list[dict]) -> None:
    for job in jobs:
        if job["kind"] == "train":
            train(job)
            continue
        texts = json.loads(Path(job["texts"]).read_text())
        match job["kind"]:
            case "sentencepiece":
                out = with_sentencepiece(job["path"], texts)
            case "tiktoken":
                out = with_tiktoken(job["path"], texts)
            case "fast" | "slow":
                out = with_transformers(job["path"], texts, job["kind"] == "fast")
        Path(job["out"]).write_text(json.dumps(out))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
