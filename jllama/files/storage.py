"""Files by path or URL: local, gs:// (extra `gcs`) or s3:// (extra `s3`).

An object store has no directories, no rename and no append; a put shows the whole object or
nothing. So what is whole says so by a marker that is written last, what grows is kept locally and
copied now and then (`jllama.files.mirror`), and nothing here renames an object. Locally a file is
written beside its place and moved there.

A path that is wrong or forbidden is a UserError, storage that fails otherwise a StorageError, and
reading a file that is missing a FileNotFoundError.
"""

import contextlib
import dataclasses
import errno
import glob
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import fsspec
from etils import epath

from jllama.errors import StorageError, UserError

_EXTRAS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme: module, this package's extra
_CHUNK = 1 << 23
_NOT_READABLE, _NOT_WRITABLE = "not readable", "not writable"
# The path is wrong, or closed to this user: to try again would be in vain. gcsfs gives an HttpError
# its status as `code`, but for 403.
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
# Other hosts write too: what a listing said a minute ago may be wrong now.
for _scheme in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)


@dataclasses.dataclass(frozen=True)
class Stat:
    """A file's size in bytes, and what changes when its content does.

    `version` is a checksum or tag kept by the store, or the local time of change in nanoseconds.
    """

    size: int
    version: str


def path(where: str | os.PathLike) -> Path:
    """A path that speaks pathlib: `pathlib.Path`, `~` expanded, or an `epath.Path` for a URL.

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
        raise UserError(f"{text}: {scheme}:// needs {module}; pip install 'jllama[{extra}]'")
    return epath.Path(text)


def is_remote(where: str | os.PathLike) -> bool:
    """Whether it is a URL."""
    return "://" in os.fspath(where)


def absolute(where: Path) -> Path:
    """A local path from the root; a URL as it is."""
    return where if is_remote(where) else where.absolute()


def make_folder(folder: Path) -> None:
    """The folder with its parents; an object store needs none."""
    if not is_remote(folder):
        with _errors(folder, _NOT_WRITABLE):
            folder.mkdir(parents=True, exist_ok=True)


def exists(where: Path) -> bool:
    """Whether a file is there; a folder counts locally, and not at a URL."""
    with _errors(where, _NOT_READABLE):
        if not is_remote(where):
            return where.exists()
        try:  # fsspec's own isfile and exists take every error for an absence
            return _system(where).info(os.fspath(where))["type"] == "file"
        except FileNotFoundError:
            return False


def is_folder(where: Path) -> bool:
    """Whether it is a directory, or the beginning of some object's name."""
    with _errors(where, _NOT_READABLE):
        return _system(where).isdir(os.fspath(where)) if is_remote(where) else where.is_dir()


class Listing(NamedTuple):
    """What stands right in a folder: the sizes of its files in bytes, by name, and its folders."""

    files: dict[str, int]
    folders: set[str]


def listing(folder: Path) -> Listing:
    """One look into a folder, at a URL one request; empty if there is no folder."""
    with _errors(folder, _NOT_READABLE):
        try:
            if not is_remote(folder):
                entries = list(os.scandir(folder))
                files = {e.name: e.stat().st_size for e in entries if e.is_file()}
                return Listing(files, {e.name for e in entries if e.is_dir()})
            # A name that ends with / asks for what is below it, and never for an object.
            entries = _system(folder).ls(f"{os.fspath(folder)}/", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return Listing({}, set())
    named = [(e["name"].rstrip("/").rsplit("/", 1)[-1], e) for e in entries]
    files = {name: e["size"] for name, e in named if e["type"] == "file"}
    return Listing(files, {name for name, e in named if e["type"] == "directory"})


def names(folder: Path) -> dict[str, int]:
    """The files of `listing`."""
    return listing(folder).files


def stat(file: Path) -> Stat:
    """Size and version of a file."""
    with _errors(file, _NOT_READABLE):
        if not is_remote(file):
            found = file.stat()
            return Stat(found.st_size, f"mtime {found.st_mtime_ns}")
        info = _system(file).info(os.fspath(file))
    for key in ("crc32c", "md5Hash", "ETag", "etag", "generation"):
        if value := info.get(key):
            return Stat(info["size"], f"{key} {value}".replace('"', ""))
    return Stat(info["size"], f"mtime {info.get('mtime') or info.get('LastModified')}")


def matches(pattern: str) -> list[str]:
    """Files that a path or glob (`*`, `?`, `[]`, `**`) means, as spelt by it, sorted."""
    here = path(pattern)
    if not is_remote(pattern):
        # A path that exists is itself, even with brackets in its name.
        found = [str(here)] if here.exists() else glob.glob(str(here), recursive=True)
        return sorted(name for name in found if not Path(name).is_dir())
    scheme = pattern.partition("://")[0]
    with _errors(here, _NOT_READABLE):
        if exists(here):
            return [pattern]
        found = _system(here).glob(pattern, detail=True)
    return sorted(f"{scheme}://{name}" for name, info in found.items() if info["type"] == "file")


def reading(file: Path) -> contextlib.AbstractContextManager[None]:
    """What goes wrong while a file is read becomes an error that names it."""
    return _errors(file, _NOT_READABLE)


def writing(where: Path) -> contextlib.AbstractContextManager[None]:
    """What goes wrong while a file or folder is written becomes an error that names it."""
    return _errors(where, _NOT_WRITABLE)


def open_read(file: Path) -> BinaryIO:
    """A seekable stream of a file's bytes."""
    with _errors(file, _NOT_READABLE):
        return _system(file).open(os.fspath(file), "rb") if is_remote(file) else open(file, "rb")


def read_bytes(file: Path) -> bytes:
    """A whole file, at a URL by one request."""
    with _errors(file, _NOT_READABLE):
        return _system(file).cat_file(os.fspath(file)) if is_remote(file) else file.read_bytes()


def read_text(file: Path) -> str:
    """A whole file as UTF-8; UserError if it is not."""
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 at byte {e.start}") from None


def read_json(file: Path) -> dict:
    """A file that holds one JSON object; UserError if it is missing, or holds anything else."""
    try:
        found = json.loads(read_text(file))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not readable as JSON: {one_line(e)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object")
    return found


def write_bytes(file: Path, data: bytes) -> None:
    """Writes a file: whole, or not at all."""
    with _errors(file, _NOT_WRITABLE):
        if is_remote(file):
            _system(file).pipe_file(os.fspath(file), data)
            return
        with replacing(file) as part, open(part, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


def write_text(file: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(file, text.encode("utf-8"))


def remove(file: Path) -> None:
    """Removes an object at a URL, if it is there."""
    with _errors(file, _NOT_WRITABLE), contextlib.suppress(FileNotFoundError):
        _system(file).rm_file(os.fspath(file))


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it, if it is there."""
    with _errors(folder, _NOT_WRITABLE), contextlib.suppress(FileNotFoundError):
        if is_remote(folder):
            _system(folder).rm(os.fspath(folder), recursive=True)
        else:
            shutil.rmtree(folder)


def read_range(file: Path, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file."""
    if start == stop:
        return b""
    with _errors(file, _NOT_READABLE):
        if is_remote(file):
            return _system(file).cat_file(os.fspath(file), start=start, end=stop)
        with open(file, "rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)


def read_into(file: Path, start: int, buffer: memoryview) -> None:
    """Fills `buffer` with the bytes of a file from `start` on; UserError if it ends before that."""
    with _errors(file, _NOT_READABLE):
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


def put(local: Path, file: Path) -> None:
    """Copies a local file to a path or URL: whole, or not at all."""
    if is_remote(file):
        upload(local, file)
        return
    with _errors(file, _NOT_WRITABLE), replacing(file) as part:
        shutil.copyfile(local, part)


def upload(local: Path, file: Path) -> None:
    """Copies a local file to a URL."""
    with _errors(file, _NOT_WRITABLE):
        _system(file).put_file(os.fspath(local), os.fspath(file))


def download(file: Path, local: Path) -> None:
    """Copies a URL's object to a local file: whole, or not at all."""
    with (
        open_read(file) as source,
        _errors(local, _NOT_WRITABLE),
        replacing(local) as part,
        open(part, "wb") as target,
    ):
        shutil.copyfileobj(source, target, _CHUNK)


def transfer(copy: Callable[[Path, Path], None], pairs: Iterable[tuple[Path, Path]]) -> None:
    """`copy` (`upload` or `download`) of each pair, several at a time; stops at the first error."""
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [pool.submit(copy, source, target) for source, target in pairs]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A name beside `file` to write to, which then takes its place."""
    # Other hosts have the same process numbers.
    part = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, file)
    except BaseException:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)  # see `outputs.stoppable`
        else:
            part.unlink(missing_ok=True)
        raise


def _system(where: Path) -> fsspec.AbstractFileSystem:
    return fsspec.filesystem(os.fspath(where).partition("://")[0])


@contextlib.contextmanager
def _errors(where: Path, what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except OSError as e:
        if isinstance(e, FileNotFoundError) and what == _NOT_READABLE:
            raise
        raise _kind(e)(f"{where}: {what}: {e.strerror or one_line(e)}") from None
    except Exception as e:  # the stores' clients raise what they like
        if not is_remote(where):
            raise
        raise _kind(e)(f"{where}: {what}: {one_line(e)}") from None


def _kind(error: Exception) -> type[UserError]:
    wrong = (
        isinstance(error, _WRONG)
        or getattr(error, "errno", None) in _WRONG_NUMBERS
        or str(getattr(error, "code", "")) in _WRONG_CODES
        or str(error).startswith("Forbidden")
    )
    return UserError if wrong else StorageError


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks, its middle left out beyond 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-145:]}"
