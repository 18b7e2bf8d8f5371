"""Reads the documents of one file, or of a range of examples of a TFDS dataset.

A reader yields (place, text or the reason why it cannot be used) for each document. Everything
streams: memory is bounded by the longest document.
"""

import codecs
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds

from jllama.config import JsonlSource, ParquetSource, StdlibSource, TextSource, TfdsSource
from jllama.data import json_array, text_files
from jllama.errors import UserError
from jllama.files import storage


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


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A document that cannot be used, and why."""

    reason: str


def _text(data: bytes) -> str | Skipped:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return Skipped("is UTF-16 and not UTF-8; convert the file")
        line = data.count(b"\n", 0, e.start)
        at = f" {line} lines into it" if line else ""
        return Skipped(f"invalid UTF-8, byte 0x{data[e.start]:02x}{at}")


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


def _read_text(source: TextSource, file: SourceFile) -> Iterator[tuple[str, str | Skipped]]:
    if source.separator is None:
        yield file.name, _text(b"".join(text_files.read_chunks(file.path)))
        return
    if not source.separator:
        raise UserError("separator: is empty; write null to make each file one document")
    chunks = text_files.read_chunks(file.path)
    for line, data in text_files.split(chunks, source.separator.encode()):
        if data:  # nothing is between two separators in a row, as between paragraphs far apart
            yield f"{file.name}:{line}", _text(data)


def _read_jsonl(source: JsonlSource, file: SourceFile) -> Iterator[tuple[str, str | Skipped]]:
    """A record a line; or if the file begins with a bracket, the items of one array."""
    chunks, start = text_files.read_chunks(file.path), b""
    for chunk in chunks:
        start += chunk
        if start.strip():
            break
    chunks = itertools.chain([start], chunks)
    if start.lstrip().startswith(b"["):
        try:
            for number, record in enumerate(json_array.items(chunks, _JSON), 1):
                yield f"{file.name}: item {number}", _record_text(record, source.field)
        except (json_array.BrokenArray, UnicodeDecodeError, RecursionError) as e:
            raise UserError(f"{file.name}: not a JSON array: {storage.one_line(e)}") from None
        return
    for line, data in text_files.split(chunks, b"\n"):
        if data.strip():  # a blank line is not a document
            yield f"{file.name}:{line}", _json_text(data, source.field)


def _json_text(data: bytes, field: str) -> str | Skipped:
    text = _text(data)
    if isinstance(text, Skipped):
        return text
    try:
        record = _JSON.decode(text)
    except ValueError as e:
        return Skipped(f"malformed JSON: {e}")
    except RecursionError:
        return Skipped("JSON that is nested too deeply to be read")
    return _record_text(record, field)


def _record_text(record: object, field: str) -> str | Skipped:
    if not isinstance(record, dict):
        return Skipped("not a JSON object")
    if field not in record:
        fields = ", ".join(map(repr, itertools.islice(record, 5))) or "none"
        return Skipped(f"no field {field!r}; it has {fields}: name the one with the text (field)")
    return _string(record[field], field)


def _integer(digits: str) -> int | float:
    # Python makes no integer of thousands of digits, and no text depends on it.
    return int(digits) if len(digits) < 1000 else float(digits)


_JSON = json.JSONDecoder(parse_int=_integer)


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
        raise UserError(f"{file.name}: not readable as Parquet: {storage.one_line(e)}") from None


def _arrow_text(value: pyarrow.Scalar, field: str) -> str | Skipped:
    try:
        return _string(value.as_py(), field)
    except UnicodeDecodeError as e:
        return Skipped(f"invalid UTF-8 at byte {e.start}")


def tfds_summary(source: TfdsSource) -> str:
    """Describes a TFDS dataset in a few words, for messages."""
    return f"TFDS {source.name}[{source.split}]"


def open_builder(source: TfdsSource, fetch: bool = True) -> tfds.core.DatasetBuilder:
    """Opens a TFDS dataset. If `fetch`, it is downloaded and built unless it is on this machine.

    Raises UserError if the dataset cannot be found or built.
    """
    folder = storage.path(source.name)
    if "s3" in {source.name.partition("://")[0], (source.data_dir or "").partition("://")[0]}:
        raise UserError(f"{tfds_summary(source)}: array_record reads only local files and gs://")
    try:
        if storage.exists(folder / "dataset_info.json"):
            builder = tfds.builder_from_directory(folder)
        else:
            place = {"data_dir": source.data_dir, "try_gcs": False}
            builder = tfds.builder(source.name, **place)
            if not builder.is_prepared():
                if not fetch:
                    raise UserError("the dataset is not on this machine")
                builder = tfds.builder(source.name, **place, file_format="array_record")
                builder.download_and_prepare()
    # TFDS and the dataset's own script may raise anything, always because of this dataset.
    except Exception as e:
        raise UserError(f"{tfds_summary(source)}: {storage.one_line(e)}") from None
    stored = builder.info.file_format
    if stored not in tfds.core.FileFormat.with_random_access():
        raise UserError(
            f"{tfds_summary(source)}: {builder.data_dir} holds it as {stored.value}, and only"
            " array_record can be read in any order: give the dataset's name in TFDS's catalogue"
            " and another data_dir, where it is built as array_record, or write its texts to JSON"
            " lines"
        )
    return builder


def find_split(builder: tfds.core.DatasetBuilder, source: TfdsSource) -> tfds.core.SplitInfo:
    """Returns the split of a source. Raises UserError if the split or the field is missing."""
    try:
        split = builder.info.splits[source.split]
    except (KeyError, ValueError, AssertionError) as e:
        names = ", ".join(sorted(builder.info.splits))
        raise UserError(f"{tfds_summary(source)}: {storage.one_line(e)}; splits: {names}") from None
    if source.field not in builder.info.features:
        names = ", ".join(sorted(builder.info.features))
        raise UserError(f"{tfds_summary(source)}: no feature {source.field!r}; features: {names}")
    return split


def _read_tfds(source: TfdsSource, examples: range) -> Iterator[tuple[str, str | Skipped]]:
    try:
        rows = open_builder(source).as_data_source(source.split)
    except Exception as e:  # see open_builder
        raise UserError(f"{tfds_summary(source)}: {storage.one_line(e)}") from None
    for i in examples:
        value = rows[i][source.field]
        where = f"{tfds_summary(source)}: example {i}"
        yield where, _text(value) if isinstance(value, bytes) else _string(value, source.field)


READERS = {
    StdlibSource: _read_library,
    TfdsSource: _read_tfds,
    TextSource: _read_text,
    JsonlSource: _read_jsonl,
    ParquetSource: _read_parquet,
}
