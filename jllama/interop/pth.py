"""Reads the tensors of PyTorch's zip files (.pth, .bin) without PyTorch and without running code.

Such a file is an uncompressed zip: `data.pkl` describes the tensors, `data/KEY` holds the bytes of
a storage. A pickle is a program. The interpreter in this module knows only the instructions and
names that state dicts need. It builds dicts and tuples, which are checked afterwards.
"""

import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jllama.errors import UserError
from jllama.files import storage
from jllama.interop.tensors import Tensor, check_fetched, in_file

_MAX_PICKLE = 4_000_000  # bytes, which become some hundred MB; a model's are far below a million
_MAX_AXES = 8
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


def _ordered_dict():
    return {}


def _rebuild_tensor(storage, offset, shape, stride, *_):
    return _View(storage, offset, shape, stride)


def _rebuild_parameter(data, *_):
    return data  # what follows are gradients, hooks and attributes


def _rebuild_from_type(rebuild, _, arguments, *__):
    """A tensor with attributes, which are dropped; whatever can be called is in `_GLOBALS`."""
    return rebuild(*arguments)


_GLOBALS = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch._utils _rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor _rebuild_from_type_v2": _rebuild_from_type,
    "torch Size": tuple,
    "torch Tensor": _Type("Tensor"),
    "torch.nn.parameter Parameter": _Type("Parameter"),
    **{f"torch {name}": _Type(dtype) for name, dtype in _STORAGES.items()},
}


def read_pth(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; their data is not read.

    Raises UserError for a file that is missing, truncated, corrupt or of another format, or that
    holds anything but tensors.
    """
    try:
        check_fetched(file)
        with storage.open_read(file) as stream:
            return _read(file, stream)
    except (zipfile.BadZipFile, struct.error, NotImplementedError) as e:
        raise UserError(
            f"{file}: truncated, or in the format of PyTorch before 1.6; read it with torch.load"
            f" and write it again with torch.save: {storage.one_line(e)}"
        ) from None


def _read(file: Path, stream: Any) -> dict[str, Tensor]:
    entries = {entry.filename: entry for entry in zipfile.ZipFile(stream).infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UserError(f"{file}: not a file of torch.save: {len(roots)} entries named data.pkl")
    root, size = roots[0], storage.stat(file).size

    def span(name: str) -> tuple[int, int]:
        """The start and the length of an entry's bytes in the file."""
        entry = entries.get(root + name)
        if entry is None:
            raise UserError(f"{file}: corrupt: {root}{name} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UserError(f"{file}: {root}{name} is compressed, which torch.save never does")
        # The stream of a URL reads ahead, and would fetch the whole file in the end.
        at = entry.header_offset
        header = storage.read_range(file, at, at + _LOCAL_HEADER.size)
        signature, *lengths = _LOCAL_HEADER.unpack(header)
        start = at + _LOCAL_HEADER.size + sum(lengths)
        if signature != b"PK\x03\x04" or start + entry.file_size > size:
            raise UserError(f"{file}: corrupt or truncated: {root}{name} is not where it should be")
        return start, entry.file_size

    if f"{root}byteorder" in entries:
        start, length = span("byteorder")
        if length > 6 or storage.read_range(file, start, start + length) != b"little":
            raise UserError(f"{file}: written on a big-endian machine; save it again on another")
    start, length = span("data.pkl")
    if length > _MAX_PICKLE:
        raise UserError(f"{file}: {root}data.pkl has {length:,} bytes, too many for a model")
    data = storage.read_range(file, start, start + length)
    return {name: _tensor(file, name, view, span) for name, view in _state_dict(file, data)}


def _state_dict(file: Path, data: bytes) -> list[tuple[str, _View]]:
    try:
        loaded = _run(data)
    except Exception as e:  # a broken pickle may raise anything
        reason = storage.one_line(e)
        raise UserError(f"{file}: not read, because it holds more than tensors: {reason}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: holds a {type(loaded).__name__}, expected a dict of tensors")
    for name, value in loaded.items():
        if not isinstance(value, _View):
            kind = type(value).__name__
            raise UserError(
                f"{file}: {name[:80]!r} is a {kind}, expected a dict of tensors; save only those"
            )
    return list(loaded.items())


def _run(data: bytes) -> Any:
    """Runs the pickle's program and returns what it builds.

    Python's unpickler would set attributes, hash any object as a key (which does not end, or
    overflows the stack, with nested tuples), and allocate as many objects as the file says.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int) -> list[Any]:
        if not 0 <= count <= len(stack) - (marks[-1] if marks else 0):
            raise ValueError("it takes more objects than it made")
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return taken

    def pop_to_mark() -> list[Any]:
        count = len(stack) - marks[-1]
        taken = pop(count)
        marks.pop()
        return taken

    def top() -> Any:
        (value,) = pop(1)
        stack.append(value)
        return value

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                if argument.bit_length() > 63:
                    raise ValueError("it holds a number of more than 64 bits")
                stack.append(argument)
            case "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "APPEND" | "APPENDS":
                items = pop(1) if opcode.name == "APPEND" else pop_to_mark()
                list.extend(top(), items)
            case "SETITEM" | "SETITEMS":
                items = pop(2) if opcode.name == "SETITEM" else pop_to_mark()
                keys, values = items[::2], items[1::2]
                if not all(isinstance(key, str) for key in keys):
                    raise ValueError("a dict has keys that are no text")
                dict.update(top(), zip(keys, values, strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = top()
            case "MEMOIZE":
                memo[len(memo)] = top()
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_global(argument))
            case "STACK_GLOBAL":
                stack.append(_global(" ".join(pop(2))))
            case "BINPERSID":
                stack.append(_storage(*pop(1)))
            case "REDUCE":
                function, arguments = pop(2)
                if not callable(function):
                    raise ValueError("it calls something that is no function")
                stack.append(function(*arguments))
            case "BUILD":
                pop(1)  # drops attributes of a state dict, such as its version
                top()
            case "STOP":
                return pop(1)[0]
            case name:
                raise ValueError(f"it has the instruction {name}, which no state dict needs")
    raise ValueError("it has no end")


def _global(name: str) -> Any:
    if name not in _GLOBALS:
        raise ValueError(f"it names {name.replace(' ', '.')}, which is no part of a tensor")
    return _GLOBALS[name]


def _storage(reference: Any) -> _Storage:
    match reference:
        case ("storage", _Type(dtype=dtype), str(key), str(), int()):
            return _Storage(dtype, key)
    raise ValueError("it refers to something that is no storage")


def _tensor(file: Path, name: str, view: _View, span: Any) -> Tensor:
    match view:
        case _View(storage=_Storage(dtype=dtype, key=key), offset=int(offset), shape=tuple(shape)):
            pass
        case _:
            raise UserError(f"{file}: {name}: not a sound tensor")
    if offset < 0 or len(shape) > _MAX_AXES or any(type(n) is not int or n < 0 for n in shape):
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
    return in_file(file, start + offset * itemsize, shape, dtype)


def _contiguous(shape: tuple[int, ...], stride: Any) -> bool:
    if not isinstance(stride, tuple) or len(stride) != len(shape):
        return False
    expected = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return all(n == 1 or s == e for n, s, e in zip(shape, stride, expected, strict=True))
