"""`jllama vocabulary`: tokenizers trained, merged and compared, and a model grown to one."""

import argparse
import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jllama.config import TrainedTokenizer
from jllama.data import text_files
from jllama.errors import UserError
from jllama.files import outputs, storage
from jllama.progress import say
from jllama.text.infill import PIECES
from jllama.text.merge import merge_vocabularies
from jllama.text.tokenizer import SentencePieceTokenizer, load_tokenizer
from jllama.text.vocabulary import train_sentencepiece

_LEAST = TrainedTokenizer(kind="train", vocab_size=300)  # and the defaults of the rest
_OUT = "FILE.model, or a folder for it and its settings; not there yet"
_FILES = "UTF-8 texts, paths or globs, .gz and .zst too"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str) -> Any:
        return actions.add_parser(name, help=summary, description=summary).add_argument

    add = action("train", "SentencePiece BPE on text files")
    add("files", nargs="+", metavar="FILE", help=_FILES)
    add("--out", required=True, metavar="OUT", help=_OUT)
    add(
        "--size",
        type=int,
        required=True,
        metavar="N",
        help="pieces, the 3 control and 256 byte ones in it",
    )
    add(
        "--max-bytes",
        type=int,
        default=_LEAST.max_bytes,
        metavar="N",
        help=f"text to read; of several files each gives its share [{_LEAST.max_bytes}]",
    )
    add("--cross-words", action="store_true", help="pieces may span several words")
    add("--infill", action="store_true", help="with the four control tokens of infilling")

    add = action("merge", "the pieces that one vocabulary lacks appended from another")
    add("base", metavar="BASE", help="a SentencePiece BPE model, or its folder; keeps its ids")
    add(
        "new",
        nargs="?",
        metavar="NEW",
        help="a SentencePiece model, BPE or unigram, whose pieces follow [special tokens alone]",
    )
    add("--out", required=True, metavar="MERGED", help=_OUT)
    add(
        "--special",
        action="append",
        default=[],
        metavar="TEXT",
        help="a control token after them; may be given several times",
    )
    add("--infill", action="store_true", help="the four control tokens of infilling, before others")
    add("--pad", default="", metavar="TEXT", help="one for padding, the last; usually [PAD]")

    add = action("compare", "tokens per character, and characters per token, on texts")
    add("tokenizers", nargs="+", metavar="TOKENIZER", help="files or folders")
    add("--text", nargs="+", required=True, metavar="FILE", help=_FILES)
    add("--json", action="store_true", help="exact figures, for programs")

    add = action("grow", "a model with rows for the new ids of a merged tokenizer, in our format")
    add("source", metavar="MODEL", help="a run, a step or a model's folder; Hugging Face's, Meta's")
    add("tokenizer", metavar="TOKENIZER", help="keeps the ids of the model's own, as merge does")
    add("target", metavar="DST", help="a folder that is not there yet")
    add(
        "--rows",
        choices=("pieces", "mean", "random"),
        default="pieces",
        help="a new row is the mean of the rows of its old pieces, the mean of all rows, or drawn"
        " from a normal distribution with each column's mean and standard deviation [pieces]",
    )
    add("--seed", type=int, default=0, metavar="N", help="of random rows [0]")
    add(
        "--multiple",
        type=int,
        default=1,
        metavar="N",
        help="pad the rows to a multiple of N, which divides over devices [1]",
    )
    add("--from", dest="source_format", choices=("jllama", "hf", "meta"), help="[found by looking]")
    add("--model", metavar="MODEL", help="what Meta's folder is: in configs/model, or a file")


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
            raise UserError(f"--{name} {value}: at least {least}")
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

    trained = train_sentencepiece(texts(), config)
    _save(trained, storage.path(args.out))
    print(f"{args.out}: {trained.vocab_size:,} pieces")


def _merge(args: argparse.Namespace) -> None:
    outputs.check_absent(storage.path(args.out))
    base = load_tokenizer(args.base)
    new = None if args.new is None else load_tokenizer(args.new)
    specials = [*(PIECES if args.infill else ()), *args.special]
    made = merge_vocabularies(
        base, new, specials=specials, pad=args.pad, names=(args.base, args.new)
    )
    if not made.appended + made.specials:
        raise UserError(
            f"{args.new}: has no piece that {args.base} lacks; nothing to merge"
            if new
            else "nothing to merge: give NEW, --special, --infill or --pad"
        )
    if made.unreachable:
        say(
            f"note: {made.unreachable:,} of the {made.appended:,} pieces are in no text: BPE makes"
            " a piece of two others, and these have no such two"
        )
    _save(made.tokenizer, storage.path(args.out))
    parts = [f"{made.base:,} of {args.base}"]
    parts += [f"{made.appended:,} of {args.new}"] * bool(args.new)
    parts += [f"{made.specials:,} special"] * bool(made.specials)
    print(f"{args.out}: {made.tokenizer.vocab_size:,} pieces: {', '.join(parts)}")


def _save(tokenizer: SentencePieceTokenizer, out: Path) -> None:
    if out.suffix == ".model":
        with outputs.new_file(out) as new:
            new.write_bytes(tokenizer.model)
        return
    with outputs.new_folder(out, "tokenizer.model") as new:
        tokenizer.save(new)


def _texts(path: Path) -> Iterator[str]:
    """A file in parts that end with a line; UserError if it is not UTF-8."""
    decoder, held = codecs.getincrementaldecoder("utf-8")(), ""
    try:
        for chunk in text_files.read_chunks(path):
            held += decoder.decode(chunk)
            end = held.rfind("\n") + 1
            if end:
                yield held[:end]
                held = held[end:]
        held += decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 ({e.reason}); convert it, or leave it out") from None
    yield held


def _first(path: Path, left: int) -> Iterator[str]:
    """The first bytes of a file's text."""
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
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
