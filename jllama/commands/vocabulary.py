"""`jllama vocabulary`: trains, merges and compares tokenizers, and grows a model to one."""

import argparse
import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jllama.commands.table import table
from jllama.config import TrainedTokenizer
from jllama.data import text_files
from jllama.errors import UserError
from jllama.files import outputs, storage
from jllama.progress import say
from jllama.text.infill import PIECES
from jllama.text.merge import merge_vocabularies
from jllama.text.tokenizer import SentencePieceTokenizer, load_tokenizer, tokenizer_place
from jllama.text.vocabulary import train_sentencepiece

_LEAST = TrainedTokenizer(kind="train", vocab_size=300)  # the least vocab_size, and the defaults
_OUT = "FILE.model, or a folder for it and its settings; must not exist"
_FILES = "paths or globs of UTF-8 texts, which may be compressed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str) -> Any:
        return actions.add_parser(name, help=summary, description=summary).add_argument

    add = action("train", "train a SentencePiece BPE model on text files")
    add("files", nargs="+", metavar="FILE", help=_FILES)
    add("--out", required=True, metavar="OUT", help=_OUT)
    add(
        "--size",
        type=int,
        required=True,
        metavar="N",
        help="number of pieces, including 3 control and 256 byte pieces",
    )
    add(
        "--max-bytes",
        type=int,
        default=_LEAST.max_bytes,
        metavar="N",
        help=f"bytes of text to read, from all files in proportion [{_LEAST.max_bytes}]",
    )
    add("--cross-words", action="store_true", help="let pieces span several words")
    add("--infill", action="store_true", help="add the four control tokens of infilling")

    add = action("merge", "append to a vocabulary the pieces of another that it lacks")
    add("base", metavar="BASE", help="a SentencePiece BPE model, or its folder; its ids stay")
    add(
        "new",
        nargs="?",
        metavar="NEW",
        help="a SentencePiece model, BPE or unigram, whose pieces follow [only special tokens]",
    )
    add("--out", required=True, metavar="MERGED", help=_OUT)
    add(
        "--special",
        action="append",
        default=[],
        metavar="TEXT",
        help="a control token to append after the pieces; may be given several times",
    )
    add("--infill", action="store_true", help="append the control tokens of infilling before those")
    add("--pad", default="", metavar="TEXT", help="append a padding token last; usually [PAD]")

    add = action("compare", "count tokens per character, and characters per token, on texts")
    add("tokenizers", nargs="+", metavar="TOKENIZER", help="files or folders")
    add("--text", nargs="+", required=True, metavar="FILE", help=_FILES)
    add("--json", action="store_true", help="print exact figures as JSON")

    add = action("grow", "give a model rows for the new ids of a merged tokenizer, in our format")
    add("source", metavar="MODEL", help="a run, a step or a model's folder; Hugging Face's, Meta's")
    add("tokenizer", metavar="TOKENIZER", help="begins with the ids of the model's own, as merge's")
    add("target", metavar="DST", help="a folder that does not exist yet")
    add(
        "--rows",
        choices=("pieces", "mean", "random"),
        default="pieces",
        help="a new row is the mean of the rows of its old pieces, the mean of all rows, or drawn"
        " from a normal distribution with each column's mean and standard deviation [pieces]",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of random rows [0]")
    add(
        "--multiple",
        type=int,
        default=1,
        metavar="N",
        help="pad the rows to a multiple of N, so that they divide over devices [1]",
    )
    add("--from", dest="source_format", choices=("jllama", "hf", "meta"), help="[found by looking]")
    add("--model", metavar="MODEL", help="the model in Meta's folder: in configs/model, or a file")


def run(args: argparse.Namespace) -> None:
    if args.action == "grow":
        # Importing jax takes seconds, which no other action needs.
        from jllama.commands.grow import grow  # noqa: PLC0415

        grow(args)
        return
    {"train": _train, "merge": _merge, "compare": _compare}[args.action](args)


def _train(args: argparse.Namespace) -> None:
    for name, value, least in (
        ("size", args.size, _LEAST.vocab_size),
        ("max-bytes", args.max_bytes, 1),
    ):
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    outputs.check_absent(storage.path(args.out))
    config = TrainedTokenizer(
        kind="train",
        vocab_size=args.size,
        max_bytes=args.max_bytes,
        cross_words=args.cross_words,
        infill=args.infill,
    )
    paths = [storage.path(name) for name in text_files.find_files(tuple(args.files), ".txt")]
    sizes = [storage.stat(path).size for path in paths]
    total = sum(sizes)
    if total > args.max_bytes:
        say(f"note: {args.max_bytes:,} of {total:,} bytes are read (--max-bytes)")

    def texts() -> Iterator[str]:
        for path, size in zip(paths, sizes, strict=True):
            if total > args.max_bytes:
                yield from _first(path, size * args.max_bytes // total)
            else:
                yield from _texts(path)

    trained = train_sentencepiece(texts(), config, "--size")
    _save(trained, storage.path(args.out))
    print(f"{args.out}: {trained.vocab_size:,} pieces")


def _merge(args: argparse.Namespace) -> None:
    outputs.check_absent(storage.path(args.out))
    base = load_tokenizer(args.base)
    new = None if args.new is None else load_tokenizer(args.new)
    specials = [*(PIECES if args.infill else ()), *args.special]
    # Errors name files that are there.
    names = (str(tokenizer_place(args.base)), args.new)
    merged = merge_vocabularies(base, new, specials=specials, pad=args.pad, names=names)
    if not merged.appended + merged.specials:
        raise UserError(
            f"{args.new}: has no piece that {args.base} lacks; nothing to merge"
            if new
            else "nothing to merge: give NEW, --special, --infill or --pad"
        )
    if merged.unreachable:
        say(
            f"note: {merged.unreachable:,} of the {merged.appended:,} pieces will never occur: BPE"
            " merges two pieces to one, and no two pieces make these"
        )
    _save(merged.tokenizer, storage.path(args.out))
    parts = [f"{merged.base:,} of {args.base}"]
    parts += [f"{merged.appended:,} of {args.new}"] * bool(args.new)
    parts += [f"{merged.specials:,} special"] * bool(merged.specials)
    print(f"{args.out}: {merged.tokenizer.vocab_size:,} pieces: {', '.join(parts)}")


def _save(tokenizer: SentencePieceTokenizer, out: Path) -> None:
    if out.suffix == ".model":
        with outputs.new_file(out) as new:
            new.write_bytes(tokenizer.model)
        return
    with outputs.new_folder(out, "tokenizer.model") as new:
        tokenizer.save(new)


def _texts(path: Path) -> Iterator[str]:
    """A file's text in parts of whole lines; UserError if it is not UTF-8."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")(), ""
    try:
        for chunk in text_files.read_chunks(path):
            rest += decoder.decode(chunk)
            end = rest.rfind("\n") + 1
            if end:
                yield rest[:end]
                rest = rest[end:]
        rest += decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 ({e.reason}); convert it, or leave it out") from None
    yield rest


def _first(path: Path, left: int) -> Iterator[str]:
    """The first `left` bytes of a file's text."""
    for text in _texts(path):
        data = text.encode()
        yield data[:left].decode(errors="ignore")
        left -= len(data)
        if left <= 0:
            return


def _compare(args: argparse.Namespace) -> None:
    tokenizers = [(name, load_tokenizer(name)) for name in args.tokenizers]
    names = [name for pattern in args.text for name in text_files.find_files((pattern,), ".txt")]
    rows, totals = [], dict.fromkeys(range(len(tokenizers)), (0, 0))
    for name in names:
        text = "".join(_texts(storage.path(name)))
        if not text:
            raise UserError(f"{name}: is empty; give a text")
        for i, (tokenizer_name, tokenizer) in enumerate(tokenizers):
            counts = len(text), len(tokenizer.encode(text))
            totals[i] = tuple(map(sum, zip(totals[i], counts, strict=True)))
            rows.append(_figures(name, tokenizer_name, tokenizer.vocab_size, *counts))
    if len(names) > 1:
        for i, (tokenizer_name, tokenizer) in enumerate(tokenizers):
            rows.append(_figures("all", tokenizer_name, tokenizer.vocab_size, *totals[i]))
    print(json.dumps(rows, indent=2, ensure_ascii=False) if args.json else _table(rows))


def _figures(text: str, name: str, pieces: int, characters: int, tokens: int) -> dict[str, Any]:
    return {
        "text": text,
        "tokenizer": name,
        "pieces": pieces,
        "characters": characters,
        "tokens": tokens,
        "tokens_per_character": tokens / characters,
        "characters_per_token": characters / tokens,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    head = [key.replace("_", " ") for key in rows[0]]
    cells = [head]
    for row in rows:
        counts = (f"{row[key]:,}" for key in ("pieces", "characters", "tokens"))
        rates = (f"{row[key]:.3f}" for key in ("tokens_per_character", "characters_per_token"))
        cells.append([row["text"], row["tokenizer"], *counts, *rates])
    return table(cells, left=range(2))
