"""Parameters from the tensors of a file, and the tensors of a file from parameters.

A tensor is read with `pread` into a buffer of its own, brought into this package's layout, put on
the devices that hold its parts, and written into its layer of the stacked parameter there. So the
host's memory holds at most three tensors beside what its devices hold; mapping the files and
stacking the layers would take 2.3 times the parameters.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jllama.config import ComputeConfig, ModelConfig
from jllama.errors import UserError
from jllama.interop.names import NAMES, FileFormat, Name, file_shape, name_of
from jllama.interop.tensors import DTYPES, Tensor, cast, from_file, nbytes, of_param, same_values
from jllama.model.llama import Params, ParamSpec, param_specs
from jllama.model.param import EachLeaf, dotted
from jllama.parallel.sharding import layer_sharding
from jllama.progress import Progress, note


def match(
    tensors: Mapping[str, Tensor], specs: Params, format: FileFormat, where: Path
) -> dict[str, list[Tensor]]:
    """The tensors of each parameter, by its path: one per layer, or a single one.

    Args:
      tensors: those of the model's parameters, by their names in the files, and no others.
      specs: tree of `jllama.model.llama.ParamSpec`.

    Raises UserError that lists every missing, extra and misshapen tensor by both names.
    """
    layers = max(spec.shape[0] for path, spec in _flat(specs).items() if name_of(path).stacked)
    if layers > len(tensors):
        raise UserError(f"{where}: {layers:,} layers by the config, and {len(tensors):,} tensors")
    wanted = {
        name.of(format, layer or 0): (name.path, file_shape(spec.shape, spec.inputs))
        for name, layer, spec in layers_of(specs)
    }
    check_tensors(tensors, wanted, where)
    if any(tensor.dtype == "float64" for tensor in tensors.values()):
        note(f"{where}: its float64 tensors are rounded to float32")
    by_path: dict[str, list[Tensor]] = {}
    for file_name, (path, _) in wanted.items():
        by_path.setdefault(path, []).append(tensors[file_name])
    return by_path


def check_tensors(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[str, tuple[int, ...]]],
    where: Path,
    whose: str = "this model's",
) -> None:
    """Raises UserError that lists every missing, extra and misshapen tensor by both names.

    `wanted` has, by the name in the files, our path and the shape in the files of each tensor.
    """
    wrong: dict[str, list[tuple[str, str]]] = {}
    for name, (path, shape) in wanted.items():
        tensor = tensors.get(name)
        ours = f"ours {path}"
        if tensor is None:
            wrong.setdefault("missing", []).append((name, ours))
        elif tensor.shape != shape:
            text = f"{ours}: {list(tensor.shape)}, and the config makes it {list(shape)}"
            wrong.setdefault("misshapen", []).append((name, text))
        elif tensor.dtype not in DTYPES:
            text = f"{ours}: {tensor.dtype}, and weights are {', '.join(sorted(DTYPES))}"
            wrong.setdefault("not weights", []).append((name, text))
    if extra := sorted(tensors.keys() - wanted.keys()):
        wrong["extra"] = [(name, "no such parameter") for name in extra]
    if wrong:
        parts = [f"{kind}: {', '.join(_ranges(names))}" for kind, names in wrong.items()]
        raise UserError(f"{where}: not {whose} tensors: {'; '.join(parts)}")


def _flat(tree: Params) -> dict[str, ParamSpec]:
    return {dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _ranges(names: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Joins names that differ in the layer's number only: `layers.{0-31}.wq (text)`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, text in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = f"{name[: number.start()]}{{}}{name[number.end() :]}" if number else name
        groups.setdefault((pattern, text), []).append(int(number[0]) if number else 0)
    for (pattern, text), layers in groups.items():
        # Layers that follow one another have the same distance to their index in the sorted list.
        runs = itertools.groupby(enumerate(sorted(layers)), lambda pair: pair[1] - pair[0])
        spans = [[layer for _, layer in run] for _, run in runs]
        spelt = ",".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans)
        span = spelt if spelt.isdigit() else f"{{{spelt}}}"
        yield f"{pattern.replace('{}', span)} ({text})"


def tie_tables(tensors: dict[str, Tensor], format: FileFormat) -> bool:
    """Leaves in `tensors` the one table of a tied model, under the embedding's name.

    Files have the embedding, or the head (safetensors' `save_model` keeps either), or both; False
    if both are there and differ.
    """
    head, table = (name_of(path).of(format) for path in ("head.weight", "embedding.weight"))
    copy = tensors.pop(head, None)
    if copy is None or tensors.setdefault(table, copy) is copy:
        return True
    return same_values(copy, tensors[table])


def cast_params(params: Params, dtype: str, scale_dtype: str) -> Params:
    """Casts matrices to `dtype` and the norms' scales to `scale_dtype`, one array at a time.

    Raises UserError, with the path, for a value that becomes infinite.
    """
    leaves, tree = jax.tree.flatten_with_path(params)
    del params
    for i, (path, leaf) in enumerate(leaves):
        wanted = scale_dtype if path[-1].key == "scale" else dtype
        if leaf.dtype != wanted:
            leaf, largest = _cast(leaf, wanted)
            if largest:
                raise UserError(f"{dotted(path)}: {largest:g} does not fit {wanted}; use float32")
        leaves[i] = leaf
    return tree.unflatten(leaves)


@functools.partial(jax.jit, static_argnums=1)
def _cast(leaf: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """The array in `dtype`, and the largest finite value that becomes infinite, or 0."""
    # On all cores: twice as fast on two as `cast`, whose arrays are NumPy's.
    out = leaf.astype(dtype)
    lost = jnp.isinf(out) & jnp.isfinite(leaf)
    return out, jnp.max(jnp.where(lost, jnp.abs(leaf), 0)).astype(jnp.float32)


def widest_dtype(by_path: Mapping[str, Sequence[Tensor]], *, scales: bool) -> str:
    """The dtype that holds every matrix exactly, or with `scales` every scale of a norm.

    It is float32 for float64, whose values are rounded.
    """
    dtypes = {
        tensor.dtype
        for path, tensors in by_path.items()
        if path.endswith("scale") == scales
        for tensor in tensors
    }
    return dtypes.pop() if len(dtypes) == 1 and "float64" not in dtypes else "float32"


def read_params(
    by_path: Mapping[str, Sequence[Tensor]],
    specs: Params,
    placed: Params,
    each: EachLeaf | None = None,
    *,
    interleaved: bool,
    title: str,
) -> Params:
    """Reads the parameters in the dtypes and onto the devices of `placed`; shows progress in bytes.

    Args:
      by_path: what `match` returns.
      specs: tree of `ParamSpec`.
      placed: tree of `jax.ShapeDtypeStruct` with shardings, as `llama.placed_shapes` makes it; rows
        that a table has beyond `specs` are zeros.
      each: maps a path and an array to what is kept of it, before the next one is read.
      interleaved: the RoPE pairs of queries and keys lie side by side in the files.

    Every process that holds a part of the parameters must call this, and each reads every tensor.
    Raises UserError for a value that becomes infinite in its dtype of `placed`.
    """
    size = sum(nbytes(tensor) for tensors in by_path.values() for tensor in tensors)
    quiet = jax.process_index() > 0
    leaves, tree = jax.tree.flatten(placed)
    paths = list(_flat(specs).items())
    order = [tensor for path, _ in paths for tensor in by_path[path]]
    keep = each or (lambda path, x: x)
    out = []
    with Progress(title, size, quiet) as progress, ThreadPoolExecutor(1) as reader:
        arrays = _ahead(reader, order)
        for (path, spec), leaf in zip(paths, leaves, strict=True):
            name = name_of(path)
            layout = functools.partial(
                from_file, inputs=spec.inputs, interleaved=interleaved and name.rotary
            )

            def part(sharding, shape, placed, layout=layout, dtype=leaf.dtype, path=path):
                array = next(arrays)
                progress.advance(array.nbytes)
                return _put(layout(array, shape), placed, sharding, dtype, path)

            if not name.stacked:
                out.append(keep(path, part(leaf.sharding, spec.shape, leaf.shape)))
                continue
            stacked = _zeros(leaf.shape, leaf.dtype, leaf.sharding)
            per_layer = layer_sharding(leaf.sharding)
            write = _writer(leaf.sharding)
            for layer in range(spec.shape[0]):
                array = part(per_layer, spec.shape[1:], leaf.shape[1:])
                stacked = write(stacked, array, layer)
                stacked.block_until_ready()  # else the host would hold this layer and the next
            out.append(keep(path, stacked))
            del stacked
    return tree.unflatten(out)


def _ahead(reader: ThreadPoolExecutor, tensors: Sequence[Tensor]) -> Iterator[np.ndarray]:
    """The arrays of the tensors; one is read while the caller uses the one before."""
    pending = None
    for tensor in tensors:
        following = reader.submit(tensor.read)
        if pending is not None:
            yield pending.result()
        pending = following
    if pending is not None:
        yield pending.result()


@functools.cache
def _writer(sharding):
    def write(stacked: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, layer, index, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _zeros(shape, dtype, sharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


def _put(array: np.ndarray, shape, sharding, dtype, path: str) -> jax.Array:
    """Puts on each device its part of the array, contiguous and in `dtype`.

    `shape` may have more rows than the array; they are zeros.
    """
    parts: dict[str, np.ndarray] = {}

    def part_at(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)  # devices that hold the same part share it
        if key not in parts:
            part = cast(array[index], dtype, path)
            missing = len(range(shape[0])[index[0]]) - len(part)
            if missing:
                part = np.pad(part, ((0, missing), *((0, 0) for _ in part.shape[1:])))
            parts[key] = part
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, part_at)


def layers_of(specs: Params) -> Iterator[tuple[Name, int | None, ParamSpec]]:
    """Each tensor that a file has of these parameters, in the order of `NAMES`.

    Yields its names, its layer (None if the parameter is not stacked), and the spec of one layer.
    """
    flat = _flat(specs)
    for name in NAMES:
        if name.path not in flat:
            continue
        spec = flat[name.path]
        if not name.stacked:
            yield name, None, spec
            continue
        of_one = dataclasses.replace(spec, shape=spec.shape[1:])
        for layer in range(spec.shape[0]):
            yield name, layer, of_one


def file_specs(config: ModelConfig) -> Params:
    """The tree of `ParamSpec` that files of other formats hold: tables have no padding.

    Raises UserError for a parameter that has no name in other formats.
    """
    specs = param_specs(config.unpadded, ComputeConfig(dtype="float32"))
    for path in _flat(specs):
        name_of(path)
    return specs


def file_tensors(
    params: Params, specs: Params, format: FileFormat, *, interleaved: bool
) -> dict[str, Tensor]:
    """The tensors of a file of `format` by their names, in the order of `NAMES`.

    `specs` is what `file_specs` returns; rows that a table has beyond it are left out.
    """
    leaves = _flat(params)
    return {
        name.of(format, layer or 0): of_param(
            leaves[name.path], layer, spec.shape, spec.inputs, interleaved and name.rotary
        )
        for name, layer, spec in layers_of(specs)
    }
