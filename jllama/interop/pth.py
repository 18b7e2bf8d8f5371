"""Tensors of PyTorch's zip files (.pth, .bin), without PyTorch and running no code of theirs.

Such a file is an uncompressed zip: `data.pkl` says what the tensors are, `data/KEY` holds the bytes
of a storage. A pickle is a program. Here it may name only what state dicts of tensors are made of,
which builds plain tuples; nothing else is imported, and the tuples are checked afterwards.
"""

import collections
import io
import math
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jllama import storage
from jllama.errors import UserError
from jllama.interop.tensors import FileTensor

_MAX_PICKLE = 64_000_000  # bytes; a model's are some hundred thousand
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


# Tuples, as a pickle can set attributes of everything else.
class _Type(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    dtype: str
    key: str


class _View(NamedTuple):
    storage: Any
    offset: Any
    shape: Any
    stride: Any


def _rebuild_tensor(storage, offset, shape, stride, *_):
    return _View(storage, offset, shape, stride)


def _rebuild_parameter(data, *_):
    return data


_GLOBALS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _Type(dtype) for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a tensor")
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _Type(dtype=dtype), str(key), str(), int()):
                return _Storage(dtype, key)
        raise pickle.UnpicklingError("it refers to something that is no storage")


def read_pth(file: Path) -> dict[str, FileTensor]:
    """The tensors of a file, by name; none of their data is read.

    Raises UserError for a missing, truncated or corrupt file, one of another format, and one that
    holds anything but tensors.
    """
    try:
        with storage.open_read(file) as stream:
            return _read(file, stream)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (zipfile.BadZipFile, struct.error, NotImplementedError) as e:
        raise UserError(
            f"{file}: truncated, or not PyTorch's zip format, which torch.save writes since 1.6:"
            f" {storage.one_line(e)}"
        ) from None


def _read(file: Path, stream: Any) -> dict[str, FileTensor]:
    entries = {entry.filename: entry for entry in zipfile.ZipFile(stream).infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UserError(f"{file}: not a file of torch.save: {len(roots)} entries named data.pkl")
    root, size = roots[0], storage.stat(file).size

    def span(name: str) -> tuple[int, int]:
        """Where an entry's bytes lie."""
        entry = entries.get(root + name)
        if entry is None:
            raise UserError(f"{file}: corrupt: {root}{name} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UserError(f"{file}: {root}{name} is compressed, which torch.save never does")
        stream.seek(entry.header_offset)
        signature, *lengths = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
        start = entry.header_offset + _LOCAL_HEADER.size + sum(lengths)
        if signature != b"PK\x03\x04" or start + entry.file_size > size:
            raise UserError(f"{file}: corrupt or truncated: {root}{name} is not where it should be")
        return start, entry.file_size

    if f"{root}byteorder" in entries:
        start, length = span("byteorder")
        if length > 6 or storage.read_range(file, start, start + length) != b"little":
            raise UserError(f"{file}: written on a big-endian machine; save it again on another")
    start, length = span("data.pkl")
    if length > _MAX_PICKLE:
        raise UserError(f"{file}: {root}data.pkl has {length:,} bytes: no model's")
    stream.seek(start)
    data = stream.read(length)
    return {name: _tensor(file, name, view, span) for name, view in _state_dict(file, data)}


def _state_dict(file: Path, data: bytes) -> list[tuple[str, _View]]:
    try:
        _check_memo(data)
        loaded = _Unpickler(io.BytesIO(data), encoding="utf-8").load()
    except Exception as e:  # whatever a broken pickle makes of itself
        reason = storage.one_line(e)
        raise UserError(f"{file}: not read, as it holds more than tensors: {reason}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: holds a {type(loaded).__name__}, expected a dict of tensors")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, _View):
            kind = type(value).__name__
            raise UserError(f"{file}: {str(name)[:80]!r} is a {kind}, expected a dict of tensors")
    return list(loaded.items())


def _check_memo(data: bytes) -> None:
    """The unpickler makes room for every number below the one that an object is kept under."""
    last = -1
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if argument > last + 1:
                raise pickle.UnpicklingError(f"it keeps an object under {argument}, out of order")
            last = max(last, argument)


def _tensor(file: Path, name: str, view: _View, span: Any) -> FileTensor:
    match view:
        case _View(storage=_Storage(dtype=dtype, key=key), offset=int(offset), shape=tuple(shape)):
            pass
        case _:
            raise UserError(f"{file}: {name}: not a sound tensor")
    if offset < 0 or any(type(n) is not int or n < 0 for n in shape):
        raise UserError(f"{file}: {name}: not a sound tensor")
    if not _contiguous(shape, view.stride):
        raise UserError(
            f"{file}: {name} is a strided view of its storage; save it again with .contiguous()"
        )
    start, length = span(f"data/{key}")
    itemsize = jnp.dtype(dtype).itemsize
    if (offset + math.prod(shape)) * itemsize > length:
        raise UserError(
            f"{file}: corrupt: {name} is {list(shape)} {dtype}, its storage {length:,} bytes"
        )
    return FileTensor(file, start + offset * itemsize, shape, dtype)


def _contiguous(shape: tuple[int, ...], stride: Any) -> bool:
    if not isinstance(stride, tuple) or len(stride) != len(shape):
        return False
    expected = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return all(n == 1 or s == e for n, s, e in zip(shape, stride, expected, strict=True))
