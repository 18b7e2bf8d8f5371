"""A model on storage, in whichever format, and its parameters when they are asked for."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import pydantic

from jllama.adapt.vocab import repadded, with_rows
from jllama.config import AutoAttention, ComputeConfig, ModelConfig, RunConfig
from jllama.errors import UserError
from jllama.files import storage
from jllama.interop import hf, meta
from jllama.interop.parameters import file_specs, match, read_params, widest_dtype
from jllama.interop.tensors import Tensor
from jllama.model import llama
from jllama.model.param import EachLeaf, dotted
from jllama.progress import note
from jllama.store.adapter import Adapter, base_of, open_adapter
from jllama.store.find import CHECKPOINTS, Found, find
from jllama.store.fingerprint import Fingerprint
from jllama.store.tokenizer import tokenizer_of
from jllama.text.tokenizer import Tokenizer

_NO_RUN = RunConfig(name="none")  # its defaults


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model that was checked, with the adapters over it; no parameters are read yet.

    Attributes:
      found: where it is.
      config: the architecture.
      compute: how it is computed unless told otherwise.
      dtype, scale_dtype: what its matrices and its norms' scales are stored in: float32, bfloat16
        or float16.
      tokenizer: None where there is none. It may have more ids than the embedding has rows.
      compilation_cache: folder of compiled programs; empty is none.
      read: (placed, each=None) -> the parameters, in the dtypes and on the devices of `placed`, the
        tree that `llama.placed_shapes` makes; its tables may have another padding. With an
        `EachLeaf`, each parameter is passed to it as soon as it is read, and the tree of its
        results is returned, so that one parameter at a time is in memory as it is stored.
      adapters: by name.
    """

    found: Found
    config: ModelConfig
    compute: ComputeConfig
    dtype: str
    scale_dtype: str
    tokenizer: Tokenizer | None
    compilation_cache: str
    read: Callable[..., llama.Params]
    adapters: Mapping[str, Adapter] = dataclasses.field(default_factory=dict)

    @property
    def place(self) -> Path:
        """Where its parameters are: for a run the step's folder."""
        if not self.found.is_run:
            return self.found.folder
        return self.found.folder / CHECKPOINTS / str(self.found.checkpoint())

    @property
    def tokenizer_path(self) -> Path:
        """Where `tokenizer` was read, if there is one: at an adapter, or else at the model."""
        for adapter in self.adapters.values():
            if adapter.tokenizer is not None and adapter.tokenizer.digest == self.tokenizer.digest:
                return adapter.path
        return self.found.path


def open_model(
    found: Found,
    model: str | ModelConfig | None = None,
    tokenizer: str | Path | None = None,
) -> StoredModel:
    """Checks all that can be checked without reading the parameters.

    Args:
      model: for Meta's folders, which do not say all: a name in configs/model, a file like those,
        or a config. A name or file for another format is an error.
      tokenizer: the path of another than the folder's, or "none".

    Raises UserError if it is no model, or one that cannot be expressed here.
    """
    if found.is_adapter:
        raise UserError(
            f"{found.path}: is an adapter and no model; alone, jllama.load and sample.py --model"
            " open it with its base; beside other adapters it is one of --adapter, over its base;"
            f" and `jllama convert BASE DST --adapter {found.path}` makes a model of the two"
        )
    if isinstance(model, str) and found.format != "meta":
        raise UserError(f"--model {model}: {found.path} says itself what it is; leave it out")
    if found.stored is not None:
        return _ours(found, tokenizer_of(found, tokenizer))
    if found.format == "hf":
        read = hf.read_folder(found.folder, found.files)
    else:
        read = meta.read_folder(found.folder, found.files, model)
    return _foreign(found, *read, tokenizer_of(found, tokenizer))


def architecture(found: Found) -> ModelConfig:
    """The architecture of a model, for which no weights need be there if its config says it all.

    Raises UserError as `open_model` does.
    """
    if found.stored is not None:
        return found.stored.model
    return hf.read_architecture(found.folder) if found.format == "hf" else open_model(found).config


def architecture_at(path: str) -> ModelConfig:
    """`architecture` of the model at a path, as recipes name it."""
    found = find(storage.path(path))
    if found.format == "peft":
        raise UserError(f"{path}: is an adapter of PEFT's; name its base")
    return architecture(found)


def open_adapted(
    found: Found,
    adapters: Mapping[str, str | Path] | None = None,
    model: str | ModelConfig | None = None,
    tokenizer: str | Path | None = None,
    max_length: int | None = None,
) -> StoredModel:
    """A model with adapters over it, by name; or an adapter with its base.

    The model is as the adapters were trained over it: RoPE and length, padding, dtype of the
    computation, and their tokenizer, where they all have the same. Raises UserError if they are of
    several kinds that cannot be had together.

    Args:
      model: that of `open_model`.
      tokenizer: the path of another than the model's or the adapters', or "none".
      max_length: in place of the model's.
    """
    if adapters is None and found.is_adapter:
        opened = {found.path.name: open_adapter(found, tokenizer)}
        found = base_of(*opened.values())
    else:
        given = (adapters or {}).items()
        opened = {name: open_adapter(find(storage.path(path)), tokenizer) for name, path in given}
    stored = with_adapters(open_model(found, model, tokenizer), opened)
    rows = stored.config.vocab_size
    if stored.tokenizer is not None and stored.tokenizer.text_size > rows:
        note(
            f"{found.path}: its tokenizer has {stored.tokenizer.vocab_size:,} ids and its embedding"
            f" {rows:,} rows: a text that needs another is an error; is it this model's tokenizer?"
        )
    if max_length is None:
        return stored
    try:
        config = dataclasses.replace(stored.config, max_length=max_length)
    except pydantic.ValidationError as e:
        raise UserError(f"max_length={max_length}: {e.errors()[0]['msg']}") from None
    return dataclasses.replace(stored, config=config)


def with_adapters(base: StoredModel, adapters: Mapping[str, Adapter]) -> StoredModel:
    """The model with adapters over it, by name, as they were trained over it; see `open_adapted`.

    Raises UserError if they are of several kinds that cannot be had together.
    """
    configs = {adapter.trained_config(base.config) for adapter in adapters.values()}
    for what, values in (
        ("bases kept in", {adapter.quantize for adapter in adapters.values()}),
        (
            "several of model.rope, rope_theta, rms_norm_eps, max_length and vocab_multiple:",
            configs,
        ),
    ):
        if len(values) > 1:
            named = " and ".join(sorted(v if isinstance(v, str) else repr(v.rope) for v in values))
            raise UserError(f"adapters: trained over {what} {named}; load them apart")
    changes: dict[str, Any] = {"adapters": adapters}
    if configs:
        changes["config"] = configs.pop()
    tokenizers = {a.tokenizer.digest: a.tokenizer for a in adapters.values() if a.tokenizer}
    if len(tokenizers) == 1:
        changes["tokenizer"] = tokenizers.popitem()[1]
    dtypes = {adapter.dtype for adapter in adapters.values() if adapter.dtype}
    if len(dtypes) == 1:
        changes["compute"] = dataclasses.replace(base.compute, dtype=dtypes.pop())
    return dataclasses.replace(base, **changes)


def read_base(base: StoredModel, placed: llama.Params, keep: EachLeaf) -> tuple[llama.Params, str]:
    """Reads the base through `keep`, as `StoredModel.read` does, and returns the tree with the
    fingerprint by which an adapter knows its base.
    """
    digest = Fingerprint("bfloat16")

    def each(path: str, x: jax.Array) -> Any:
        digest.add(path, x)
        return keep(path, x)

    return base.read(placed, each), str(digest)


def _ours(found: Found, tokenizer: Tokenizer | None) -> StoredModel:
    # A run that trains on must not change what is read.
    found = dataclasses.replace(found, step=found.checkpoint())
    stored = found.stored
    dtype = stored.compute.param_dtype
    return StoredModel(
        found=found,
        config=stored.model,
        compute=dataclasses.replace(stored.compute, attention=AutoAttention(kind="auto")),
        dtype=dtype,
        scale_dtype=stored.scale_dtype or dtype,
        tokenizer=tokenizer,
        compilation_cache=(stored.run or _NO_RUN).compilation_cache,
        read=functools.partial(_read_ours, found, stored.model.vocab_rows),
    )


def _read_ours(
    found: Found, rows: int, placed: llama.Params, each: EachLeaf | None = None
) -> llama.Params:
    # Orbax takes a third of a second to import, which other formats do not need.
    from jllama.store.checkpoint import load_params  # noqa: PLC0415

    as_stored = with_rows(placed, rows)
    if each is None:
        params = load_params(found.folder, found.step, as_stored)
        return jax.tree.map(repadded, params, placed)
    wanted = {dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(placed)}

    def repadded_each(path: str, x: jax.Array) -> Any:
        return each(path, repadded(x, wanted[path]))

    return load_params(found.folder, found.step, as_stored, repadded_each)


def _foreign(
    found: Found, config: ModelConfig, tensors: dict[str, Tensor], tokenizer: Tokenizer | None
) -> StoredModel:
    specs = file_specs(config)
    matched = match(tensors, specs, found.format, found.folder)
    stored = widest_dtype(matched, scales=False)
    # float32 holds float16 exactly, and bfloat16 does not.
    dtype = "bfloat16" if stored == "bfloat16" else "float32"
    return StoredModel(
        found=found,
        config=config,
        compute=ComputeConfig(dtype=dtype, param_dtype=dtype),
        dtype=stored,
        scale_dtype=widest_dtype(matched, scales=True),
        tokenizer=tokenizer,
        compilation_cache=_NO_RUN.compilation_cache,
        read=functools.partial(
            read_params,
            matched,
            specs,
            interleaved=found.format == "meta",
            title=f"read {found.folder.name}",
        ),
    )
