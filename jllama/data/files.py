"""Files by pattern, their bytes streamed, decompressed and split. Every problem is a UserError."""

import contextlib
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from jllama.errors import UserError
from jllama.files import storage

_CHUNK = 1 << 18


class NoFiles(UserError):
    """A pattern that matches no file."""


def matches(patterns: tuple[str, ...], suffix: str = "") -> list[str]:
    """Sorted paths, as spelt by the patterns. `NoFiles` for a pattern that matches no file.

    `suffix` is what such files mostly end with, for advice.
    """
    found = set()
    for pattern in patterns:
        names = storage.matches(pattern)
        if not names:
            if storage.is_folder(storage.path(pattern)):
                glob = f"{pattern.rstrip('/')}/**/*{suffix}"
                raise NoFiles(f"{pattern}: is a folder; its files are {glob!r}")
            raise NoFiles(f"{pattern}: no file matches; check the path")
        found.update(names)
    return sorted(found)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with storage.reading(path), storage.open_read(path) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed by its suffix. UserError if compressed data is broken."""
    with _opened(path) as file:
        try:
            if path.suffix == ".gz":
                with gzip.open(file) as unzipped:
                    while chunk := unzipped.read(_CHUNK):
                        yield chunk
            elif path.suffix == ".zst":
                yield from _unzstd(file)
            else:
                while chunk := file.read(_CHUNK):
                    yield chunk
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as e:
            raise UserError(f"{path}: broken compressed data: {e}; get the file again") from None
        except EOFError:
            raise UserError(f"{path}: compressed data ends early; get the file again") from None


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    # Not stream_reader: that takes a truncated file for a whole one.
    frame = None
    while data := file.read(_CHUNK >> 3):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            if chunk := frame.decompress(data):
                yield chunk
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError


def split(path: Path, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """(line number of its start, bytes) of each part between separators; the last may be empty."""
    line, held = 1, bytearray()
    for chunk in chunks(path):
        start = max(0, len(held) - len(separator) + 1)
        held += chunk
        done = 0
        while (at := held.find(separator, max(start, done))) >= 0:
            part = bytes(held[done:at])
            yield line, part
            line += part.count(b"\n") + separator.count(b"\n")
            done = at + len(separator)
        del held[:done]
    yield line, bytes(held)
