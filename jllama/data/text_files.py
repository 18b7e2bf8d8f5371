"""Finds the files of a source by pattern; streams, decompresses and splits them.

Every problem is a UserError.
"""

import bz2
import codecs
import errno
import glob
import gzip
import hashlib
import itertools
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from jllama.errors import UserError
from jllama.files import storage

_CHUNK = 1 << 18
_SEARCHED = 1000  # folders, for a pattern that matches files
_COMPRESSED = {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd", "bz2": b"BZh", "xz": b"\xfd7zXZ\0"}
_BROKEN = (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, lzma.LZMAError)


class NoFiles(UserError):
    """A pattern that matches no file."""


def find_files(patterns: tuple[str, ...], suffix: str = "") -> list[str]:
    """Returns the paths that the patterns match, sorted and spelt as in the patterns.

    A file that they match under several names, by links, is returned once, under the shortest.
    Raises `NoFiles` for a pattern that matches no file; where files that end with `suffix`, or as
    the pattern does, lie further down, the error proposes a pattern that matches them. Raises
    UserError for what is no file of data, such as a pipe.
    """
    paths: set[str] = set()
    for pattern in patterns:
        names = storage.matches(pattern)
        if not names:
            raise _no_files(pattern, suffix)
        paths.update(names)
    return sorted(_each_once(paths))


def _no_files(pattern: str, suffix: str) -> NoFiles:
    if storage.is_folder(storage.path(pattern)):
        if proposal := _beneath(pattern.rstrip("/"), f"*{suffix}"):
            return NoFiles(f"{pattern}: is a folder; write {proposal!r} for the files in it")
        return NoFiles(f"{pattern}: is a folder without *{suffix} files; name the files in it")
    folder, name = os.path.split(pattern)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    names = [name, f"*{suffix}"] if glob.has_magic(name) else [name]
    # Neither a whole bucket nor a whole disk is searched.
    for name in names if not storage.is_remote(pattern) and folder != "/" else ():
        if proposal := _beneath(folder or ".", name):
            return NoFiles(f"{pattern}: no file matches; {proposal!r} matches files further down")
    return NoFiles(f"{pattern}: no file matches; check the path")


def _beneath(folder: str, name: str) -> str | None:
    """Returns a pattern of the files called `name` in a folder and below, if there is any."""
    if storage.is_remote(folder):
        return f"{folder}/**/{name}"
    folder = glob.escape(folder)
    below = itertools.islice(glob.iglob(f"{folder}/**/", recursive=True), _SEARCHED)
    if any(os.path.isfile(path) for f in below for path in glob.iglob(glob.escape(f) + name)):
        return f"{folder}/**/{name}"
    return None


def _each_once(paths: Iterable[str]) -> list[str]:
    names: dict[object, str] = {}
    for path in sorted(paths, key=lambda path: (len(path), path)):
        file: object = path
        if not storage.is_remote(path):
            with storage.reading(Path(path)):
                try:
                    found = os.stat(path)
                except OSError as e:
                    if e.errno != errno.ELOOP:
                        raise
                    continue  # a link that leads around has a shorter name for the same file
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{path}: is a pipe or a device; write its data to a file")
            file = found.st_dev, found.st_ino
        names.setdefault(file, path)
    return list(names.values())


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex."""
    with storage.reading(path), storage.open_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file, decompressed (gzip, zstd, bzip2, xz), without a byte order mark.

    The first bytes tell whether and how it is compressed, whatever its name says.

    Raises UserError for a missing file, for compressed data that are broken or end early, and for
    an uncompressed file whose name says that it is compressed.
    """
    chunks, start = _decompressed(path), b""
    for chunk in chunks:
        start += chunk
        if len(start) >= len(codecs.BOM_UTF8):
            break
    yield start.removeprefix(codecs.BOM_UTF8)  # a signature of the file, and no text
    yield from chunks


def _decompressed(path: Path) -> Iterator[bytes]:
    with storage.reading(path), storage.open_read(path) as file:
        kind = _compression(file.read(8))
        file.seek(0)
        if kind is None and is_named_compressed(path):
            raise UserError(f"{path}: is not compressed, and its name says that it is; rename it")
        broken = (*_BROKEN, OSError) if kind == "bz2" else _BROKEN
        try:
            if kind == "zst":
                yield from _unzstd(file)
                return
            opened = _OPENERS[kind](file) if kind else file
            while chunk := opened.read(_CHUNK):
                yield chunk
        except broken as e:
            raise UserError(f"{path}: broken compressed data: {e}; get the file again") from None
        except EOFError:
            raise UserError(f"{path}: compressed data ends early; get the file again") from None


_OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    "gz": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}


def _compression(start: bytes) -> str | None:
    """How a file is compressed that begins so; None if it is not."""
    kind = next((k for k, magic in _COMPRESSED.items() if start.startswith(magic)), None)
    # A text may begin with "BZh"; the digits of pi follow in bzip2, or of its root if it is empty.
    return None if kind == "bz2" and start[4:7] not in (b"1AY", b"\x17rE") else kind


def is_named_compressed(path: Path) -> bool:
    """Whether the suffix of a file is one of compressed files."""
    return path.suffix[1:].lower() in _COMPRESSED


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


def split(chunks: Iterable[bytes], separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the parts of a file's bytes as (number of the line where it starts, bytes).

    The last part, after the last separator, may be empty.
    """
    line, buffer = 1, bytearray()
    for chunk in chunks:
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
