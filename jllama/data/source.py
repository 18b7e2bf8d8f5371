"""Reads documents from a source: the standard library, TFDS, text, JSON lines or Parquet.

Everything streams: memory is bounded by the longest document. A document that cannot be used
(broken UTF-8, malformed line, missing field, empty text) is skipped and reported with its file and
line; more than `max_skipped` of them are an error. A broken *file* is always an error.
"""

import dataclasses
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds

from jllama.config import JsonlSource, ParquetSource, Source, StdlibSource, TextSource, TfdsSource
from jllama.data import text_files
from jllama.errors import UserError
from jllama.files import storage
from jllama.progress import say

_EXAMPLES = 10_000  # in one part of a TFDS dataset
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, which is never empty, and its place: `file:line`, or `file` for a whole file."""

    text: str
    where: str


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
      name: the path as the pattern matched it, or relative to the source's root.
      path: opens the file.
      size, version: as in `jllama.files.storage.Stat`; if both are equal, so is the content.
    """

    name: str
    path: Path
    size: int
    version: str


class Skipped(Exception):
    """The reason why a document cannot be used."""


def documents(
    source: Source, *, max_skipped: int = 0, report: Callable[[str], None] = say
) -> Iterator[Document]:
    """Yields the documents of a source: its files are sorted, and each is read in order.

    `report` gets one line for each skipped document. Raises UserError, naming the place, if more
    than `max_skipped` documents cannot be used, for a broken or missing file, and for a source
    without documents.
    """
    skipped = count = 0
    for part in parts(source):
        for where, text in read_part(source, part):
            if not isinstance(text, Skipped):
                count += 1
                yield Document(text, where)
                continue
            report(skip_message(where, str(text), skipped, max_skipped))
            skipped += 1
    if not count:
        raise no_documents(source)


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


def parts(source: Source) -> list["SourceFile | range"]:
    """Returns the parts of a source in order: its files, or ranges of a TFDS dataset's examples."""
    if isinstance(source, TfdsSource):
        count = _split(_builder(source), source).num_examples
        return [range(i, min(i + _EXAMPLES, count)) for i in range(0, count, _EXAMPLES)]
    return source_files(source)


def read_part(source: Source, part: "SourceFile | range") -> Iterator[tuple[str, str | Skipped]]:
    """Yields each document of a part as (its place, its text or why it cannot be used)."""
    for where, text in _READERS[type(source)](source, part):
        yield where, text or Skipped("empty document")


def summary(source: Source) -> str:
    """Describes the source in a few words, for messages."""
    match source:
        case StdlibSource():
            return f"standard library ({source.split})"
        case TfdsSource():
            return f"TFDS {source.name}[{source.split}]"
        case _:
            return f"{source.kind} {', '.join(source.files)}"


def version(source: Source) -> str:
    """Returns what else decides the source's text beside its config: the interpreter's version."""
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
            builder = _builder(source, fetch)
            paths = [storage.path(p) for p in _split(builder, source).filepaths]
            pairs = [(p.name, p) for p in paths]
        case _:
            suffix = ".txt" if isinstance(source, TextSource) else f".{source.kind}"
            pairs = [(p, storage.path(p)) for p in text_files.find_files(source.files, suffix)]
    return [_file(name, path) for name, path in pairs]


def _file(name: str, path: Path) -> SourceFile:
    try:
        stat = storage.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    return SourceFile(name, path, stat.size, stat.version)


# ------------------------------------------------------------------------------ standard library


def _library(root: Path, source: StdlibSource) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        paths = [Path(folder, name) for name in files if name.endswith(".py")]
        # An empty file holds no document.
        names += [p.relative_to(root).as_posix() for p in paths if p.stat().st_size]
    held_out = source.split == "held_out"
    return sorted(n for n in names if is_held_out(n, source.held_out_one_in) == held_out)


def is_held_out(name: str, one_in: int) -> bool:
    """Whether the library file with this relative POSIX path is held out, by a hash of the path."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return number % one_in == 0


def _read_library(source: StdlibSource, file: SourceFile) -> Iterator[tuple[str, str | Skipped]]:
    text = _text(file.path.read_bytes())
    if isinstance(text, Skipped) or not source.max_characters:
        yield file.name, text
        return
    line = 1
    for part in _cut_between_lines(text, source.max_characters):
        yield f"{file.name}:{line}", part
        line += part.count("\n")


def _cut_between_lines(text: str, max_characters: int) -> Iterator[str]:
    """Yields parts of whole lines with at most `max_characters`, or of one longer line."""
    part = ""
    for line in text.splitlines(keepends=True):
        if part and len(part) + len(line) > max_characters:
            yield part
            part = ""
        part += line
    yield part


# ------------------------------------------------------------------------------------------ files


def _text(data: bytes) -> str | Skipped:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start)
        at = f" {line} lines into it" if line else ""
        return Skipped(f"invalid UTF-8, byte 0x{data[e.start]:02x}{at}")


def _read_text(source: TextSource, file: SourceFile) -> Iterator[tuple[str, str | Skipped]]:
    if source.separator is None:
        yield file.name, _text(b"".join(text_files.read_chunks(file.path)))
        return
    if not source.separator:
        raise UserError("separator: is empty; write null to make each file one document")
    pending = None
    for line, data in text_files.split_file(file.path, source.separator.encode()):
        if pending is not None:
            yield pending
        pending = f"{file.name}:{line}", _text(data)
    if data:  # the last part is empty if a separator ends the file
        yield pending


def _read_jsonl(source: JsonlSource, file: SourceFile) -> Iterator[tuple[str, str | Skipped]]:
    for line, data in text_files.split_file(file.path, b"\n"):
        if data.strip():  # a blank line is not a document
            yield f"{file.name}:{line}", _json_text(data, source.field)


def _json_text(data: bytes, field: str) -> str | Skipped:
    text = _text(data)
    if isinstance(text, Skipped):
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        return Skipped(f"malformed JSON: {e}")
    if not isinstance(record, dict):
        return Skipped("not a JSON object")
    if field not in record:
        return Skipped(f"no field {field!r}")
    return _string(record[field], field)


def _string(value: object, field: str) -> str | Skipped:
    if not isinstance(value, str):
        return Skipped(f"field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")  # JSON can spell half a surrogate pair
    except UnicodeEncodeError as e:
        return Skipped(f"field {field!r} has an unpaired surrogate at character {e.start}")
    return value


def _read_parquet(source: ParquetSource, file: SourceFile) -> Iterator[tuple[str, str | Skipped]]:
    try:
        with (
            storage.reading(file.path),
            storage.open_read(file.path) as opened,
            pyarrow.parquet.ParquetFile(opened) as parquet,
        ):
            schema = parquet.schema_arrow
            if source.field not in schema.names:
                raise UserError(
                    f"{file.name}: no column {source.field!r}; it has {', '.join(schema.names)}"
                )
            row = 0
            for batch in parquet.iter_batches(batch_size=256, columns=[source.field]):
                for value in batch.column(0):
                    row += 1
                    yield f"{file.name}: row {row}", _arrow_text(value, source.field)
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{file.name}: not readable as Parquet: {_first_line(e)}") from None


def _arrow_text(value: pyarrow.Scalar, field: str) -> str | Skipped:
    try:
        return _string(value.as_py(), field)
    except UnicodeDecodeError as e:
        return Skipped(f"invalid UTF-8 at byte {e.start}")


# ------------------------------------------------------------------------------------------- TFDS


def _builder(source: TfdsSource, fetch: bool = True):
    folder = storage.path(source.name)
    if "s3" in {source.name.partition("://")[0], (source.data_dir or "").partition("://")[0]}:
        raise UserError(f"{summary(source)}: array_record reads only local files and gs://")
    try:
        if storage.exists(folder / "dataset_info.json"):
            return tfds.builder_from_directory(folder)
        builder = tfds.builder(
            source.name, data_dir=source.data_dir, file_format="array_record", try_gcs=False
        )
        if fetch:
            builder.download_and_prepare()  # does nothing if that was done before
        elif not builder.is_prepared():
            raise UserError("the dataset is not on this machine")
        return builder
    # TFDS and the dataset's own script may raise anything, always because of this dataset.
    except Exception as e:
        raise UserError(f"{summary(source)}: {_first_line(e)}") from None


def _split(builder, source: TfdsSource):
    try:
        split = builder.info.splits[source.split]
    except (KeyError, ValueError, AssertionError) as e:
        names = ", ".join(sorted(builder.info.splits))
        raise UserError(f"{summary(source)}: {_first_line(e)}; splits: {names}") from None
    if source.field not in builder.info.features:
        names = ", ".join(sorted(builder.info.features))
        raise UserError(f"{summary(source)}: no feature {source.field!r}; features: {names}")
    return split


def _read_tfds(source: TfdsSource, examples: range) -> Iterator[tuple[str, str | Skipped]]:
    try:
        rows = _builder(source).as_data_source(source.split)
    except Exception as e:  # see _builder
        raise UserError(f"{summary(source)}: {_first_line(e)}") from None
    for i in examples:
        value = rows[i][source.field]
        where = f"{summary(source)}: example {i}"
        yield where, _text(value) if isinstance(value, bytes) else _string(value, source.field)


def _first_line(error: Exception) -> str:
    lines = str(error).split("\n")
    return " ".join(lines[0].split()) or type(error).__name__


_READERS = {
    StdlibSource: _read_library,
    TfdsSource: _read_tfds,
    TextSource: _read_text,
    JsonlSource: _read_jsonl,
    ParquetSource: _read_parquet,
}
