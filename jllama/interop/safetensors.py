"""The safetensors format: finds the tensors of a file, and writes files tensor by tensor.

The safetensors library is not used: it maps files into memory, and writes only what is in memory as
a whole; see `jllama.interop.parameters`. The format (huggingface/safetensors): the header's length
as a 64-bit little-endian integer, the header in JSON, then the tensors without gap or overlap.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jllama.errors import UserError
from jllama.files import storage
from jllama.interop.tensors import Tensor, check_fetched, in_file, nbytes
from jllama.progress import Progress

_MAX_HEADER = 100_000_000  # bytes, the limit of the library
# NumPy's names of the dtypes of weights, and the bits of every dtype.
_NUMPY = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; their data is not read.

    Raises UserError for a missing, truncated or corrupt file.
    """
    size = storage.stat(file).size
    check_fetched(file)
    length = int.from_bytes(storage.read_range(file, 0, min(8, size)), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise UserError(
            f"{file}: not a safetensors file, or truncated: a header of {length:,} bytes in a file"
            f" of {size:,}"
        )
    try:
        header = json.loads(storage.read_range(file, 8, 8 + length), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("the header is no JSON object")
        header.pop("__metadata__", None)
        tensors = {name: _tensor(file, 8 + length, name, entry) for name, entry in header.items()}
        end = _check_gapless([(name, *header[name]["data_offsets"]) for name in header])
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not a sound safetensors file: {storage.one_line(e)}") from None
    if 8 + length + end != size:
        raise UserError(
            f"{file}: truncated, or with bytes after its end: it has {size:,} bytes, and"
            f" {8 + length + end:,} by its header; copy it again"
        )
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return unique


def _tensor(file: Path, start: int, name: str, entry: Any) -> Tensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name}: needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name}: unknown dtype {dtype!r}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or any(type(n) is not int or n < 0 for n in value):
            raise ValueError(f"{name}: {key} {value!r} are no sizes")
    bits = math.prod(shape) * _BITS[dtype]
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != bits:
        raise ValueError(f"{name}: {dtype} {shape} does not take the bytes {offsets}")
    return in_file(file, start + offsets[0], tuple(shape), _NUMPY.get(dtype, dtype))


def _check_gapless(spans: list[tuple[str, int, int]]) -> int:
    """The end of the last of (name, begin, end); ValueError for a gap or an overlap."""
    at = 0
    for name, begin, end in sorted(spans, key=lambda span: span[1:]):
        if begin != at:
            raise ValueError(f"{name}: begins at byte {begin:,} of the data, expected at {at:,}")
        at = end
    return at


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], progress: Progress) -> None:
    """Writes a local file of float32, bfloat16 or float16 tensors, one at a time in memory."""
    names = {numpy: name for name, numpy in _NUMPY.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        end = at + nbytes(tensor)
        entry = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        header[name], at = entry, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the library aligns the tensors like this
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            array = tensor.read()
            stream.write(memoryview(array.reshape(-1).view(np.uint8)))
            progress.advance(array.nbytes)
