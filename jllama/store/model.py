"""A model on storage, in whichever format: what it is, and its parameters when they are asked for.

Formats are told apart by the file that says what the model is:

  jllama  config.yaml: a run, whose newest checkpoint counts, or a model alone; RUN/checkpoints/STEP
  hf      config.json
  meta    params.json
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax

from jllama.adapt.vocab import repadded, with_rows
from jllama.config import (
    AutoAttention,
    ComputeConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    StoredConfig,
)
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.files import outputs, storage
from jllama.interop import hf, meta
from jllama.interop.names import FileFormat
from jllama.interop.parameters import file_specs, match, read_params, widest_dtype
from jllama.interop.tensors import Tensor
from jllama.model import llama
from jllama.model.param import EachLeaf, dotted
from jllama.progress import say
from jllama.store.checkpoint import Checkpoints, latest_step, load_params, room_for
from jllama.text.tokenizer import Tokenizer, find_tokenizer

RECIPE = "config.yaml"
ModelFormat = Literal["jllama", "hf", "meta"]
_FILES: dict[str, ModelFormat] = {
    RECIPE: "jllama",
    hf.CONFIG: "hf",
    meta.PARAMS: "meta",
}
# What may differ between a recipe and the model that it begins from: no parameter's shape.
FREE = {"rope", "rope_theta", "rms_norm_eps"}
_NO_RUN = RunConfig(name="none")  # its defaults


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model that was found and checked; its parameters are not read yet.

    Attributes:
      format: of the folder.
      place: where it is; of a run, the step.
      config: the architecture.
      compute: how it is computed unless told otherwise.
      dtype, scale_dtype: what its matrices and its norms' scales are stored in: float32, bfloat16
        or float16.
      tokenizer: None where the folder has none.
      compilation_cache: folder of what is compiled for it; empty is none.
      read: the parameters, in the dtypes and on the devices of `llama.placed_shapes`, whose
        tables may have another padding. Given an `EachLeaf` too, what that keeps of them, each
        before the next is read.
    """

    format: ModelFormat
    place: Path
    config: ModelConfig
    compute: ComputeConfig
    dtype: str
    scale_dtype: str
    tokenizer: Tokenizer | None
    compilation_cache: str
    read: Callable[..., llama.Params]


def open_model(
    path: Path, format: ModelFormat | None = None, model: str | ModelConfig | None = None
) -> StoredModel:
    """Finds out what `path` is, and checks all that can be checked without reading the parameters.

    Args:
      format: to force it where a folder has files of several.
      model: for Meta's folders, which do not say all: a name in configs/model, such a file, or
        what one says; that is for no other folder.

    Raises UserError if it is no model, or one that cannot be expressed here.
    """
    format = format or _format(path)
    if isinstance(model, str) and format != "meta":
        raise UserError(f"--model {model}: {path} says itself what it is; leave it out")
    if format == "jllama":
        return _own(path)
    if format == "hf":
        config, tensors = hf.read_folder(path)
    else:
        config, tensors = meta.read_folder(path, model)
    return _foreign(path, format, config, tensors)


def architecture(path: Path) -> ModelConfig:
    """What `path` says of its model; of Hugging Face's folders, whose config.json says it all,
    without their weights. Raises UserError as `open_model` does.
    """
    return hf.read_architecture(path) if _format(path) == "hf" else open_model(path).config


def _format(path: Path) -> ModelFormat:
    there = [format for file, format in _FILES.items() if storage.exists(path / file)]
    if len(there) == 1:
        return there[0]
    if there:
        raise UserError(
            f"{path}: may be {' or '.join(there)}; convert the one that you mean (jllama convert"
            " --from), or give a folder of one alone"
        )
    if path.name.isdecimal() and path.parent.name == "checkpoints":
        return "jllama"
    what = "no such folder"
    if storage.is_folder(path):
        what = "not a model"
    elif storage.exists(path):
        what = "a file, give its folder"
    raise UserError(
        f"{path}: {what}; expected a run or a model with config.yaml in it, RUN/checkpoints/STEP,"
        " or a folder of Hugging Face (config.json) or Meta (params.json); jllama downloads nothing"
    )


def run_and_step(path: Path) -> tuple[Path, int]:
    """The folder of ours that `path` is or is a step of, and the step that counts.

    Raises UserError if it is none, or has none yet.
    """
    folder, step = path, None
    if not storage.exists(path / RECIPE) and path.name.isdecimal():
        folder, step = storage.absolute(path).parent.parent, int(path.name)
    if not storage.exists(folder / RECIPE):
        raise UserError(f"{folder}: no config.yaml, which a run and a model of jllama have")
    step = latest_step(folder) if step is None else step
    if step is None:
        raise UserError(f"{path}: the run has no checkpoint yet; train it first")
    return folder, step


def _own(path: Path) -> StoredModel:
    folder, step = run_and_step(path)
    stored = recipes.load_stored(folder / RECIPE)
    if isinstance(stored.adapt, LoraConfig):
        raise UserError(
            f"{path}: is an adapter and no model; alone, jllama.load and sample.py --model open it"
            " with its base; beside other adapters it is one of --adapter, over its base; and"
            f" `jllama convert BASE DST --adapter {path}` makes a model of the two"
        )
    compute = dataclasses.replace(stored.compute, attention=AutoAttention(kind="auto"))
    tokenizer = _tokenizer(folder, stored.model.vocab_size)
    read = functools.partial(_read_own, folder, step, stored.model.vocab_rows)
    dtype = compute.param_dtype
    scales = stored.scale_dtype or dtype
    cache = (stored.run or _NO_RUN).compilation_cache
    place = folder if stored.run is None else folder / "checkpoints" / str(step)
    return StoredModel(
        "jllama", place, stored.model, compute, dtype, scales, tokenizer, cache, read
    )


def _read_own(
    folder: Path, step: int, rows: int, placed: llama.Params, each: EachLeaf | None = None
) -> llama.Params:
    there = with_rows(placed, rows)
    if each is None:
        return jax.tree.map(repadded, load_params(folder, step, there), placed)
    wanted = {dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(placed)}
    return load_params(folder, step, there, lambda path, x: each(path, repadded(x, wanted[path])))


def _tokenizer(folder: Path, rows: int) -> Tokenizer | None:
    """That of a model's folder. Raises UserError if it has more ids than the embedding rows."""
    tokenizer = find_tokenizer(folder)
    if tokenizer is not None and tokenizer.vocab_size > rows:
        added = [text for text, id in tokenizer.special_tokens.items() if id >= rows]
        beyond = f" ({', '.join(added[:3])})" if added else ""
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids and the embedding"
            f" {rows:,} rows: it is another model's, or its files add tokens{beyond}"
            " that the model was not made for; put the right files there, or take those tokens out"
        )
    return tokenizer


def _foreign(
    path: Path, format: FileFormat, config: ModelConfig, tensors: dict[str, Tensor]
) -> StoredModel:
    specs = file_specs(config)
    found = match(tensors, specs, format, path)
    tokenizer = _tokenizer(path, config.vocab_size)
    read = functools.partial(
        read_params, found, specs, interleaved=format == "meta", title=f"read {path.name}"
    )
    stored = widest_dtype(found, scales=False)
    # float32 holds float16 exactly, and bfloat16 does not.
    dtype = "bfloat16" if stored == "bfloat16" else "float32"
    compute = ComputeConfig(dtype=dtype, param_dtype=dtype)
    scales = widest_dtype(found, scales=True)
    cache = _NO_RUN.compilation_cache
    return StoredModel(format, path, config, compute, stored, scales, tokenizer, cache, read)


def write_model(
    folder: Path, config: ModelConfig, params: llama.Params, tokenizer: Tokenizer | None
) -> None:
    """Writes a model alone, float32 or bfloat16 as its parameters are, in this project's format.

    Hosts read it in parts, each its own, where they would read the whole of another format. It
    appears whole or not at all; at a URL, what lacks config.yaml is no model. Raises UserError if
    the folder holds anything.
    """
    dtype, scale_dtype = (
        params[name][leaf].dtype.name
        for name, leaf in (("embedding", "weight"), ("final_norm", "scale"))
    )
    stored = StoredConfig(
        model=config,
        compute=ComputeConfig(dtype=dtype, param_dtype=dtype),
        scale_dtype=None if scale_dtype == dtype else scale_dtype,
    )
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    with own_folder(folder) as new:
        say(f"write {folder.name}: {size / 1e6:.1f} MB")  # Orbax tells nothing
        checkpoints = Checkpoints(new, keep=1, copies=room_for(params))
        checkpoints.save(0, trainable=params)
        checkpoints.close()
        if tokenizer is not None:
            tokenizer.save(new)
        storage.write_text(new / RECIPE, recipes.to_yaml(stored))


def own_folder(folder: Path) -> contextlib.AbstractContextManager[Path]:
    """A folder for checkpoints and, last, `RECIPE`: at a URL itself, where Orbax writes."""
    outputs.check_absent(folder)
    remote = storage.is_remote(folder)
    return contextlib.nullcontext(folder) if remote else outputs.new_folder(folder, RECIPE)


def differences(there: ModelConfig, here: ModelConfig) -> tuple[bool, list[str]]:
    """Whether parameters of one model are none of the other, and what the two say differently."""
    a, b = dataclasses.asdict(there), dataclasses.asdict(here)
    differ = [key for key in b if key not in ("init", "max_length") and a[key] != b[key]]
    said = [f"model.{key} is {b[key]}, there {a[key]}" for key in differ]
    return bool(set(differ) - FREE), said
