"""Lists the files of a source, and reads its documents in order.

A document that cannot be used (broken UTF-8, malformed line, missing field, empty text) is skipped
and reported with its file and line; more than `max_skipped` of them are an error. A broken *file*
is always an error.
"""

import dataclasses
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from jllama.config import (
    JsonlSource,
    ParquetSource,
    Source,
    StdlibSource,
    TextSource,
    TfdsSource,
)
from jllama.data import text_files
from jllama.data.readers import READERS, Skipped, SourceFile, find_split, open_builder, tfds_summary
from jllama.data.worker import is_held_out, text_hash
from jllama.errors import UserError
from jllama.files import storage
from jllama.progress import note, say

_PART_EXAMPLES = 10_000  # in one part of a TFDS dataset
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, which is never empty, and its place: `file:line`, or `file` for a whole file."""

    text: str
    where: str


def documents(
    source: Source, *, max_skipped: int = 0, report: Callable[[str], None] = say
) -> Iterator[Document]:
    """Yields the documents of a source: its files are sorted, and each is read in order.

    `report` gets one line for each skipped document. Raises UserError, naming the place, if more
    than `max_skipped` documents cannot be used, for a broken or missing file, and for a source
    without documents.
    """
    skipped = count = 0
    listed = parts(source)
    for part in listed:
        for where, text in read_part(source, part):
            if not isinstance(text, Skipped):
                count += 1
                yield Document(text, where)
                continue
            report(skip_message(where, text.reason, skipped, max_skipped))
            skipped += 1
    if not count:
        raise no_documents(source)
    if isinstance(source, TextSource) and source.separator and count + skipped == len(listed):
        note(_whole_files(source, listed))


def _whole_files(source: TextSource, files: list[SourceFile]) -> str:
    """Says that no separator was found, and what may be the reason."""
    reason = "check it"
    if "\\n" in source.separator:
        reason = 'it has a backslash and an n, and in YAML a line feed is "\\n" in double quotes'
    elif "\n" in source.separator and any(
        b"\r\n" in next(iter(text_files.read_chunks(f.path)), b"") for f in files[:8]
    ):
        reason = "the lines of the files end in CR LF"
    return (
        f"{summary(source)}: the separator {source.separator!r} makes one document of each"
        f" file ({len(files):,} in all); {reason}"
    )


def skip_message(where: str, reason: str, skipped: int, max_skipped: int) -> str:
    """Returns the report on a bad document, after `skipped` others.

    Raises UserError if `max_skipped` documents have been skipped already.
    """
    if skipped == max_skipped:
        limit = f"after max_skipped={max_skipped} others" if max_skipped else "max_skipped=0"
        raise UserError(
            f"{where}: {reason} ({limit}); correct the document, or raise data.prepare.max_skipped"
        )
    return f"{where}: {reason}; skipped ({skipped + 1} of at most {max_skipped})"


def no_documents(source: Source) -> UserError:
    """Returns the error for a source without a usable document."""
    return UserError(f"{summary(source)}: no documents in it; check the source")


def of_files(pattern: str) -> TextSource | JsonlSource | ParquetSource:
    """Returns the source of a path or glob, of the kind that its name says."""
    name = re.sub(r"\.(gz|zst|bz2|xz)$", "", pattern, flags=re.IGNORECASE).lower()
    if name.endswith((".jsonl", ".json")):
        return JsonlSource(kind="jsonl", files=(pattern,))
    if name.endswith(".parquet"):
        return ParquetSource(kind="parquet", files=(pattern,))
    return TextSource(kind="text", files=(pattern,))


def parts(source: Source) -> list[SourceFile | range]:
    """Returns the parts of a source in order: its files, or ranges of a TFDS dataset's examples."""
    if isinstance(source, TfdsSource):
        count = find_split(open_builder(source), source).num_examples
        return [range(i, min(i + _PART_EXAMPLES, count)) for i in range(0, count, _PART_EXAMPLES)]
    return source_files(source)


def read_part(source: Source, part: SourceFile | range) -> Iterator[tuple[str, str | Skipped]]:
    """Yields each document of a part as (its place, its text or why it cannot be used)."""
    for where, text in READERS[type(source)](source, part):
        yield where, text or Skipped("empty document")


def summary(source: Source) -> str:
    """Describes the source in a few words, for messages."""
    match source:
        case StdlibSource():
            return f"standard library ({source.split})"
        case TfdsSource():
            return tfds_summary(source)
        case _:
            return f"{source.kind} {', '.join(source.files)}"


def version(source: Source) -> str:
    """Returns what decides the text beside the config: Python's version for its own library."""
    return platform.python_version() if isinstance(source, StdlibSource) else ""


def source_files(source: Source, *, fetch: bool = True) -> list[SourceFile]:
    """Returns the files of a source, in the order in which they are read.

    A TFDS dataset that is not on this machine is downloaded and built. Raises UserError if a
    pattern matches no file, and for a TFDS dataset that is missing if `fetch` is false.
    """
    match source:
        case StdlibSource():
            root = Path(sysconfig.get_paths()["stdlib"])
            pairs = [(name, root / name) for name in _library(root, source)]
        case TfdsSource():
            builder = open_builder(source, fetch)
            paths = [storage.path(p) for p in find_split(builder, source).filepaths]
            pairs = [(p.name, p) for p in paths]
        case _:
            suffix = ".txt" if isinstance(source, TextSource) else f".{source.kind}"
            pairs = [(p, storage.path(p)) for p in text_files.find_files(source.files, suffix)]
    return [_file(name, path) for name, path in pairs]


def _file(name: str, path: Path) -> SourceFile:
    stat = storage.stat(path)
    return SourceFile(name, path, stat.size, stat.version)


def _library(root: Path, source: StdlibSource) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        paths = [Path(folder, name) for name in files if name.endswith(".py")]
        # An empty file holds no document.
        names += [p.relative_to(root).as_posix() for p in paths if p.stat().st_size]
    wanted, one_in = source.split == "held_out", source.held_out_one_in
    return sorted(n for n in names if is_held_out(text_hash(n), one_in) == wanted)
