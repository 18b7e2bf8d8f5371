"""Finds the files of a source by pattern; streams, decompresses and splits them.

Every problem is a UserError.
"""

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


def find_files(patterns: tuple[str, ...], suffix: str = "") -> list[str]:
    """Returns the paths that the patterns match, sorted and spelt as in the patterns.

    Raises `NoFiles` for a pattern that matches no file. For a folder the error proposes a pattern
    of the files in it that end with `suffix`.
    """
    paths = set()
    for pattern in patterns:
        names = storage.matches(pattern)
        if not names:
            if storage.is_folder(storage.path(pattern)):
                glob = f"{pattern.rstrip('/')}/**/*{suffix}"
                raise NoFiles(f"{pattern}: is a folder; write {glob!r} for the files in it")
            raise NoFiles(f"{pattern}: no file matches; check the path")
        paths.update(names)
    return sorted(paths)


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex."""
    with storage.reading(path), storage.open_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file, decompressed if its suffix is .gz or .zst.

    Raises UserError for a missing file, and for compressed data that are broken or end early.
    """
    with storage.reading(path), storage.open_read(path) as file:
        try:
            if path.suffix == ".zst":
                yield from _unzstd(file)
                return
            unzipped = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
            while chunk := unzipped.read(_CHUNK):
                yield chunk
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as e:
            raise UserError(f"{path}: broken compressed data: {e}; get the file again") from None
        except EOFError:
            raise UserError(f"{path}: compressed data ends early; get the file again") from None


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    # Not stream_reader, which reads a truncated file as if it were whole.
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


def split_file(path: Path, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the parts between separators as (number of the line where it starts, bytes).

    The last part may be empty.
    """
    line, buffer = 1, bytearray()
    for chunk in read_chunks(path):
        start = max(0, len(buffer) - len(separator) + 1)
        buffer += chunk
        done = 0
        while (at := buffer.find(separator, max(start, done))) >= 0:
            part = bytes(buffer[done:at])
            yield line, part
            line += part.count(b"\n") + separator.count(b"\n")
            done = at + len(separator)
        del buffer[:done]
    yield line, bytes(buffer)
