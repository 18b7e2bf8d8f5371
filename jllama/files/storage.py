"""Files by path or URL: local, gs:// (extra `gcs`) or s3:// (extra `s3`).

An object store has no directories, no rename and no append; an upload makes the whole object appear
or nothing. So a folder is complete when its marker is there, which is written last; a file that
grows is local and is copied now and then (`jllama.files.mirror`); and this module renames no
object. A local file is written under another name and then renamed.

A wrong or forbidden path raises UserError, other failures of the storage raise StorageError, and
reading a missing file raises NoSuchFile, a UserError.
"""

import contextlib
import dataclasses
import errno
import functools
import glob
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import fsspec
from etils import epath

from jllama.errors import StorageError, UserError, install

_EXTRAS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme: module, this package's extra
_CHUNK = 1 << 23
# The path is wrong, or forbidden to this user: the same call will fail again. gcsfs sets the
# status of an HttpError as its `code`, except for 403.
_WRONG = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
_WRONG_NUMBERS = {errno.EINVAL, errno.ENAMETOOLONG, errno.EROFS}
_WRONG_CODES = {"400", "401", "403", "404"}
_THREADS = 8  # transfers at a time
# Other hosts write too, so a cached listing may be wrong.
for _scheme in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)


class NoSuchFile(UserError):
    """A file to read that is missing."""


@dataclasses.dataclass(frozen=True)
class Stat:
    """A file's size in bytes, and a version that changes with its content.

    `version` is the store's checksum or tag, or the local modification time in nanoseconds.
    """

    size: int
    version: str


def path(where: str | os.PathLike) -> Path:
    """A path with pathlib's interface: a `pathlib.Path`, `~` expanded, or for a URL `epath.Path`.

    Raises UserError for another scheme, and for a URL whose extra is not installed.
    """
    text = os.fspath(where)
    scheme, colon, _ = text.partition("://")
    if not colon:
        return Path(text).expanduser()
    if scheme not in _EXTRAS:
        raise UserError(f"{text}: give a local path or a URL of gs:// or s3://")
    module, extra = _EXTRAS[scheme]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{text}: {scheme}:// needs {module}; {install(extra)}")
    return epath.Path(text)


def is_remote(where: str | os.PathLike) -> bool:
    """Whether a path is a URL."""
    return "://" in os.fspath(where)


def absolute(where: Path) -> Path:
    """The absolute form of a local path; a URL unchanged."""
    return where if is_remote(where) else where.absolute()


def make_folder(folder: Path) -> None:
    """Makes a local folder and its parents; an object store has no folders to make."""
    if not is_remote(folder):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)


def exists(where: Path) -> bool:
    """Whether a file exists; a local folder counts too, at a URL only an object does."""
    with reading(where):
        if not is_remote(where):
            return where.exists()
        try:  # fsspec's isfile and exists would return False for any error
            return _system(where).info(os.fspath(where))["type"] == "file"
        except FileNotFoundError:
            return False


def is_folder(where: Path) -> bool:
    """Whether a path is a local folder, or at a URL the prefix of some object's name."""
    with reading(where):
        return _system(where).isdir(os.fspath(where)) if is_remote(where) else where.is_dir()


class Listing(NamedTuple):
    """The direct contents of a folder: its files' sizes in bytes by name, and its subfolders."""

    files: dict[str, int]
    folders: set[str]


def listing(folder: Path) -> Listing:
    """Lists a folder, at a URL by one request; empty if there is no such folder."""
    with reading(folder):
        try:
            if not is_remote(folder):
                entries = list(os.scandir(folder))
                files = {e.name: e.stat().st_size for e in entries if e.is_file()}
                return Listing(files, {e.name for e in entries if e.is_dir()})
            # A name that ends with / never names an object itself.
            entries = _system(folder).ls(f"{os.fspath(folder)}/", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return Listing({}, set())
    named = [(e["name"].rstrip("/").rsplit("/", 1)[-1], e) for e in entries]
    files = {name: e["size"] for name, e in named if e["type"] == "file"}
    return Listing(files, {name for name, e in named if e["type"] == "directory"})


def stat(file: Path) -> Stat:
    """Size and version of a file."""
    with reading(file):
        if not is_remote(file):
            local = file.stat()
            return Stat(local.st_size, f"mtime {local.st_mtime_ns}")
        info = _system(file).info(os.fspath(file))
    for key in ("crc32c", "md5Hash", "ETag", "etag", "generation"):
        if value := info.get(key):
            return Stat(info["size"], f"{key} {value}".replace('"', ""))
    return Stat(info["size"], f"mtime {info.get('mtime') or info.get('LastModified')}")


def matches(pattern: str) -> list[str]:
    """The files that a path or glob (`*`, `?`, `[]`, `**`) matches, sorted."""
    where = path(pattern)
    if not is_remote(pattern):
        # A path that exists is no glob, even with brackets in its name.
        files = [str(where)] if where.exists() else glob.glob(str(where), recursive=True)
        return sorted(name for name in files if not Path(name).is_dir())
    scheme = pattern.partition("://")[0]
    with reading(where):
        if exists(where):
            return [pattern]
        objects = _system(where).glob(pattern, detail=True)
    return sorted(f"{scheme}://{name}" for name, info in objects.items() if info["type"] == "file")


def open_read(file: Path) -> BinaryIO:
    """A seekable stream of a file's bytes."""
    with reading(file):
        return _system(file).open(os.fspath(file), "rb") if is_remote(file) else open(file, "rb")


def read_bytes(file: Path) -> bytes:
    """The content of a file, at a URL by one request."""
    with reading(file):
        return _system(file).cat_file(os.fspath(file)) if is_remote(file) else file.read_bytes()


def read_text(file: Path) -> str:
    """The text of a file; UserError if it is not UTF-8."""
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 at byte {e.start}") from None


def read_json(file: Path) -> dict:
    """The JSON object in a file; UserError if it is missing, or holds anything else."""
    try:
        data = json.loads(read_text(file))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not readable as JSON: {one_line(e)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected a JSON object")
    return data


def write_bytes(file: Path, data: bytes) -> None:
    """Writes a file, which appears whole or not at all."""
    with writing(file):
        if is_remote(file):
            _system(file).pipe_file(os.fspath(file), data)
            return
        with replacing(file) as part, open(part, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


def write_text(file: Path, text: str) -> None:
    """Writes a file in UTF-8, which appears whole or not at all."""
    write_bytes(file, text.encode("utf-8"))


def remove(file: Path) -> None:
    """Removes the object at a URL if it exists."""
    with writing(file), contextlib.suppress(FileNotFoundError):
        _system(file).rm_file(os.fspath(file))


def remove_folder(folder: Path) -> None:
    """Removes a folder and its contents if it exists."""
    with writing(folder), contextlib.suppress(FileNotFoundError):
        _system(folder).rm(os.fspath(folder), recursive=True)


def read_range(file: Path, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file."""
    if start == stop:
        return b""
    with reading(file):
        return _system(file).cat_file(os.fspath(file), start=start, end=stop)


def read_into(file: Path, start: int, buffer: memoryview) -> None:
    """Fills `buffer` with the bytes of a file from `start` on; UserError if it ends before that."""
    with reading(file):
        if is_remote(file):
            data = _system(file).cat_file(os.fspath(file), start=start, end=start + len(buffer))
            done = len(data)
            buffer[:done] = data
        else:
            with open(file, "rb", buffering=0) as stream:
                stream.seek(start)
                done = 0
                while done < len(buffer) and (count := stream.readinto(buffer[done:])):
                    done += count
    if done < len(buffer):
        raise UserError(f"{file}: truncated at byte {start + done:,}; copy it again")


def copy_file(source: Path, target: Path) -> None:
    """Copies a file between paths and URLs; it appears whole or not at all. Not from URL to URL."""
    if is_remote(target):
        with writing(target):
            _system(target).put_file(os.fspath(source), os.fspath(target))
        return
    with (
        open_read(source) as stream,
        writing(target),
        replacing(target) as part,
        open(part, "wb") as out,
    ):
        shutil.copyfileobj(stream, out, _CHUNK)


def transfer(pairs: Iterable[tuple[Path, Path]]) -> None:
    """Copies each (source, target), several at a time, up to an error."""
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [pool.submit(copy_file, source, target) for source, target in pairs]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Gives a name beside `file` to write to, which is renamed to `file` at the end.

    After an error it is removed.
    """
    # The random part is for other hosts, which use the same process numbers.
    part = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, file)
    except BaseException:
        discard(part)
        raise


def discard(part: Path) -> None:
    """Removes a local file or folder, even a folder that threads still write to.

    The threads would make a removed folder again, so a file takes its place until it is removed:
    everything that they write to the folder fails.
    """
    while part.is_dir():
        moved = part.rename(part.with_suffix(f".{secrets.token_hex(4)}.removed"))
        with contextlib.suppress(FileExistsError):
            part.touch(exist_ok=False)
        shutil.rmtree(moved, ignore_errors=True)
    with contextlib.suppress(OSError):
        part.unlink()


def _system(where: Path) -> fsspec.AbstractFileSystem:
    scheme, colon, _ = os.fspath(where).partition("://")
    return fsspec.filesystem(scheme if colon else "file")


@contextlib.contextmanager
def _errors(where: Path, *, what: str) -> Iterator[None]:
    """Turns errors raised inside into errors of this module that name the path."""
    try:
        yield
    except UserError:
        raise
    except OSError as e:
        if isinstance(e, FileNotFoundError) and what == "not readable":
            raise NoSuchFile(f"{where}: no such file") from None
        raise _kind(e)(f"{where}: {what}: {e.strerror or one_line(e)}") from None
    except Exception as e:  # the stores' clients raise exceptions of many types
        if not is_remote(where):
            raise
        raise _kind(e)(f"{where}: {what}: {one_line(e)}") from None


# While a file is read, and while something is written.
reading = functools.partial(_errors, what="not readable")
writing = functools.partial(_errors, what="not writable")


def _kind(error: Exception) -> type[UserError]:
    wrong = (
        isinstance(error, _WRONG)
        or getattr(error, "errno", None) in _WRONG_NUMBERS
        or str(getattr(error, "code", "")) in _WRONG_CODES
        or str(error).startswith("Forbidden")
    )
    return UserError if wrong else StorageError


def one_line(error: object) -> str:
    """An error or a text without line breaks, its middle left out beyond 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-145:]}"
