"""Tensors that are read when asked for: from one file, from several, or from parameters."""

import dataclasses
import math
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jllama.errors import UserError
from jllama.files import storage
from jllama.interop.names import file_shape, to_file

# The dtypes of a model's weights; tensors of other dtypes are quantised, or no weights.
DTYPES = {"float32", "float16", "bfloat16"}
_BLOCK = 128  # columns that are transposed at once, and fit in the cache: three times as fast


class Tensor(Protocol):
    """An array that is not read yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def read(self) -> np.ndarray:
        """Reads the whole tensor into a new array."""
        ...


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor whose bytes lie in a file, in C order, little-endian.

    `dtype` is NumPy's name, or the file's own where NumPy has none. Only dtypes of `DTYPES` are
    read.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        """Reads the whole tensor into a new array."""
        out = np.empty(self.shape, jnp.dtype(self.dtype))
        self.read_into(out)
        return out

    def read_into(self, out: np.ndarray) -> None:
        """Reads the tensor into a C-contiguous array of its shape and dtype."""
        storage.read_into(self.file, self.offset, memoryview(out.reshape(-1).view(np.uint8)))


@dataclasses.dataclass(frozen=True)
class JoinedTensor:
    """A tensor that model-parallel shards hold in parts along an axis."""

    parts: tuple[FileTensor, ...]
    axis: int

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    def read(self) -> np.ndarray:
        out = np.empty(self.shape, jnp.dtype(self.dtype))
        start = 0
        for part in self.parts:
            stop = start + part.shape[self.axis]
            if self.axis == 0:
                part.read_into(out[start:stop])
            else:
                out[:, start:stop] = part.read()
            start = stop
        return out


@dataclasses.dataclass(frozen=True)
class RepeatedTensor:
    """A tensor that every model-parallel shard holds whole."""

    parts: tuple[FileTensor, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    def read(self) -> np.ndarray:
        """Reads the tensor; UserError if the shards differ."""
        first, *others = self.parts
        array = first.read()
        for part in others:
            same_kind = (part.shape, part.dtype) == (first.shape, first.dtype)
            if not same_kind or part.read().tobytes() != array.tobytes():
                raise UserError(
                    f"{part.file}: differs from {first.file.name} in a tensor"
                    " that all shards have whole; copy them again"
                )
        return array


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


@dataclasses.dataclass(frozen=True, eq=False)
class ParamTensor:
    """A parameter, or one layer of it, in the layout of a file.

    Attributes:
      layer: None for the whole parameter.
      our_shape: the shape in this package's layout, without the padding of a table.
      inputs: the number of input axes, as in `ParamSpec`.
      interleaved: the rows are queries or keys whose RoPE pairs lie side by side in the file.
    """

    leaf: jax.Array
    layer: int | None
    our_shape: tuple[int, ...]
    inputs: int
    interleaved: bool

    @property
    def dtype(self) -> str:
        return self.leaf.dtype.name

    @property
    def shape(self) -> tuple[int, ...]:
        return file_shape(self.our_shape, self.inputs)

    def read(self) -> np.ndarray:
        """Reads the tensor into an array in C order."""
        array = self.leaf if self.layer is None else _layer(self.leaf, self.layer)
        array = to_file(
            np.asarray(array)[: self.our_shape[0]], self.inputs, interleaved=self.interleaved
        )
        return contiguous(array, array.dtype)


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
