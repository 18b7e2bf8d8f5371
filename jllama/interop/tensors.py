"""Tensors that are read when asked for, and the layout of a matrix in files and here."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jllama.errors import UserError
from jllama.files import storage
from jllama.interop.names import file_shape

# The dtypes of weights that can be read; tensors of other dtypes are quantised, or no weights.
DTYPES = {"float32", "float16", "bfloat16", "float64"}
_BLOCK = 128  # columns that are transposed at once, and fit in the cache: three times as fast


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """An array that is not read yet.

    Attributes:
      dtype: NumPy's name, or the file's own where NumPy has none. Only dtypes of `DTYPES` are read.
      read: reads the whole tensor into a new array in C order.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def in_file(file: Path, offset: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """A tensor whose bytes lie in a file, in C order, little-endian."""

    def read() -> np.ndarray:
        out = np.empty(shape, jnp.dtype(dtype))
        storage.read_into(file, offset, memoryview(out.reshape(-1).view(np.uint8)))
        return out

    return Tensor(shape, dtype, read)


def joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """A tensor that model-parallel shards hold in parts along an axis."""
    ends = list(itertools.accumulate(part.shape[axis] for part in parts))
    shape = (*parts[0].shape[:axis], ends[-1], *parts[0].shape[axis + 1 :])

    def read() -> np.ndarray:
        out = np.empty(shape, jnp.dtype(parts[0].dtype))
        for part, place in zip(parts, np.split(out, ends[:-1], axis), strict=True):
            place[...] = part.read()
        return out

    return Tensor(shape, parts[0].dtype, read)


def repeated(parts: Sequence[Tensor], where: str) -> Tensor:
    """A tensor that every model-parallel shard holds whole; `read` raises UserError if not."""

    def read() -> np.ndarray:
        for i, part in enumerate(parts):
            if not same_bits(part, parts[0]):
                raise UserError(
                    f"{where}: shard {i} differs from shard 0, and both have it whole; copy them"
                    " again"
                )
        return parts[0].read()

    return dataclasses.replace(parts[0], read=read)


def nbytes(tensor: Tensor) -> int:
    """The size of a tensor in bytes; its dtype must be one of `DTYPES`."""
    return math.prod(tensor.shape) * jnp.dtype(tensor.dtype).itemsize


def check_fetched(file: Path) -> None:
    """Raises UserError if git left a pointer in place of the file, which Git LFS did not fetch."""
    if storage.read_range(file, 0, 20).startswith(b"version https://git-"):
        raise UserError(f"{file}: is a pointer of Git LFS; fetch the file: git lfs pull")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, bit for bit.

    Reads both if their dtype is one of `DTYPES`; of others it compares shape and dtype only.
    """
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.dtype not in DTYPES:
        return True
    bits = f"u{jnp.dtype(a.dtype).itemsize}"
    return np.array_equal(a.read().view(bits), b.read().view(bits))


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of any dtypes of `DTYPES` have the same values; 0 and -0 are the same.

    Reads both, and of other dtypes it compares shape and dtype only.
    """
    if a.shape != b.shape or not {a.dtype, b.dtype} <= DTYPES:
        return (a.shape, a.dtype) == (b.shape, b.dtype)
    exact = np.float64 if "float64" in (a.dtype, b.dtype) else np.float32
    rows = zip(a.read(), b.read(), strict=True)
    return all(np.array_equal(x.astype(exact), y.astype(exact), equal_nan=True) for x, y in rows)


def of_param(
    leaf: jax.Array, layer: int | None, shape: tuple[int, ...], inputs: int, interleaved: bool
) -> Tensor:
    """A parameter, or one layer of it, in the layout of a file.

    Args:
      layer: None for the whole parameter.
      shape: the shape in this package's layout, without the padding of a table.
      inputs: the number of input axes, as in `ParamSpec`.
      interleaved: the rows are queries or keys whose RoPE pairs lie side by side in the file.
    """

    def read() -> np.ndarray:
        array = np.asarray(leaf if layer is None else _layer(leaf, layer))[: shape[0]]
        array = to_file(array, inputs, interleaved=interleaved)
        return contiguous(array, array.dtype)

    return Tensor(file_shape(shape, inputs), leaf.dtype.name, read)


@jax.jit
def _layer(leaf: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False)


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """The array in `dtype`; UserError, with `name`, if a value becomes infinite."""
    with np.errstate(over="ignore"):
        out = contiguous(array, jnp.dtype(dtype))
    if jnp.finfo(out.dtype).max < jnp.finfo(array.dtype).max:
        lost = np.isinf(out) & np.isfinite(array)
        if lost.any():
            largest = np.abs(array[lost].astype(np.float32)).max()
            raise UserError(f"{name}: {largest:g} does not fit {out.dtype}; use float32")
    return out


def contiguous(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in `dtype` and C-contiguous; where it is not yet, a copy made block by block."""
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, dtype)
    target = out
    if array.dtype == dtype and dtype.itemsize == 2:
        # NumPy copies integers faster than bfloat16, which is not a type of its own.
        array, target = array.view(np.uint16), out.view(np.uint16)
    for start in range(0, array.shape[-1], _BLOCK):
        columns = np.s_[..., start : start + _BLOCK]
        target[columns] = array[columns]
    return out


def from_file(
    array: np.ndarray, shape: Sequence[int], inputs: int, *, interleaved: bool
) -> np.ndarray:
    """A file's array as one layer's parameter of `shape`; a view where possible.

    `interleaved` says that the rows are queries or keys whose RoPE pairs lie side by side.
    """
    if not inputs:
        return array.reshape(shape)
    outputs, width = tuple(shape[inputs:]), math.prod(shape[:inputs])
    if interleaved:
        heads, n = outputs
        array = array.reshape(heads, n // 2, 2, width).swapaxes(1, 2)
    array = array.reshape(*outputs, *shape[:inputs])
    return np.moveaxis(array, range(len(outputs)), range(inputs, len(shape)))


def to_file(array: np.ndarray, inputs: int, *, interleaved: bool) -> np.ndarray:
    """One layer's parameter as a file has it, the inverse of `from_file`; a view where possible."""
    if not inputs:
        return array
    shape = array.shape
    outputs = shape[inputs:]
    array = np.moveaxis(array, range(inputs, len(shape)), range(len(outputs)))
    if interleaved:
        heads, n = outputs
        array = array.reshape(heads, 2, n // 2, *shape[:inputs]).swapaxes(1, 2)
    return array.reshape(file_shape(shape, inputs))
