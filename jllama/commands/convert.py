"""`jllama convert`: a model from one format to another."""

import argparse
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from jllama import flops
from jllama.adapt.merge import merge_overlay
from jllama.adapt.mixture import adapter_weights
from jllama.adapt.quant import quantizer
from jllama.config import MeshConfig, ModelConfig, ShardingConfig
from jllama.errors import UserError
from jllama.files import outputs, storage
from jllama.interop import gguf, hf, peft_write
from jllama.interop.gguf import KINDS, kind_of, write_gguf
from jllama.interop.parameters import cast_params
from jllama.model import llama
from jllama.model.param import map_leaves
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.progress import say
from jllama.store.adapter import base_of, open_adapter
from jllama.store.find import Found, find
from jllama.store.model import StoredModel, open_adapted, open_model
from jllama.store.tokenizer import NONE
from jllama.store.write import write_adapter, write_model
from jllama.text.tokenizer import FILES

_COPY = "copy"
# GGUF's names for the dtypes that a folder may have.
_GGUF = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        help="a run, a step or a model's folder; Hugging Face's, Meta's; or an adapter",
    )
    add("target", metavar="DST", help="a folder that does not exist yet, or a file FILE.gguf")
    add(
        "--adapter",
        metavar="PATH",
        action="append",
        help="merge it into SRC: a LoRA run, or a folder of PEFT's",
    )
    add("--base", metavar="PATH", help="if SRC is an adapter: its model [the one that it names]")
    add(
        "--base-name",
        metavar="NAME",
        help="to peft: the model's name or path where the adapter will be used, which PEFT stores"
        " as base_model_name_or_path [the model's path]",
    )
    add("--from", dest="source_format", choices=("jllama", "hf", "meta"), help="[found by looking]")
    add(
        "--to",
        dest="target_format",
        choices=("jllama", "hf", "gguf", "peft"),
        help="[gguf for a name that ends so, else hf for our models and jllama for others; for"
        " adapters peft for ours and jllama for others]",
    )
    add(
        "--dtype",
        metavar="DTYPE",
        help=f"{', '.join(_GGUF)}; for GGUF {', '.join(KINDS)} [as stored]",
    )
    add(
        "--tokenizer",
        metavar="TOKENIZER",
        help="none; copy, which copies SRC's files unread; or the path of another [SRC's, made into"
        " files of DST's format]",
    )
    add(
        "--untie",
        action="store_true",
        help="give a model that ties its tables a head of its own, equal to the embedding, for"
        " adapters that change the two apart",
    )
    add("--max-length", type=int, metavar="N", help="positions that the model reads [as stored]")
    add("--model", metavar="MODEL", help="the model in Meta's folder: in configs/model, or a file")


def run(args: argparse.Namespace) -> None:
    # No accelerator is needed; in a cluster those of several hosts would wait for each other.
    jax.config.update("jax_platforms", "cpu")
    for name, given in (("SRC", args.source), ("DST", args.target)):
        if not given:
            raise UserError(f"{name} is empty; name a folder")
    target, to = storage.path(args.target), args.target_format
    source = find(storage.path(args.source), args.source_format)
    if source.is_adapter:
        return _convert_adapter(args, source, target)
    if to == "peft" or args.base or args.base_name is not None:
        raise UserError(
            f"--to peft, --base and --base-name are for an adapter; {source.path} is a model"
        )
    given = None if args.adapter is None else {"adapter": _one_adapter(args.adapter)}
    stored = open_adapted(source, given, args.model, _opened(args.tokenizer), args.max_length)
    if to is None:
        default = "hf" if source.format == "jllama" else "jllama"
        to = "gguf" if target.suffix == ".gguf" else default
    config = stored.config
    if args.untie:
        if not config.tie_embeddings:
            raise UserError(f"--untie: {source.path} has an embedding and a head already")
        config = dataclasses.replace(config, tie_embeddings=False)
    dtype = _dtype(args.dtype, to, stored.dtype)
    copied = _copied(args.tokenizer, source, to)
    if to == "gguf" and stored.tokenizer is None and args.tokenizer != NONE:
        raise UserError(
            f"{source.path}: no tokenizer; give one (--tokenizer PATH), or --tokenizer none for a"
            " GGUF file that takes ids"
        )
    # Errors come first, before minutes of reading.
    outputs.check_absent(target)
    if to != "jllama":
        check = {"hf": hf.check_expressible, "gguf": gguf.check_expressible}[to]
        check(config, stored.tokenizer)
    count = flops.parameter_count(config)
    if to == "gguf":
        size = gguf.tensor_bytes(config, dtype)
    else:
        padding = flops.padding_count(config) if to == "jllama" else 0
        size = (count + padding) * jnp.dtype(dtype).itemsize
    outputs.check_room(target, size)
    if stored.tokenizer is None and args.tokenizer is None:
        say("note: the model has no tokenizer, and so no ids of BOS and EOS")
    with outputs.stoppable(target):
        if stored.adapters:
            params = _merged(stored, to, dtype, args.dtype)
        elif to == "gguf":
            params = read_on_host(stored, stored.dtype, stored.scale_dtype)
        else:
            params = read_on_host(stored, dtype, _scale_dtype(args.dtype, to, stored))
        if args.untie:
            params = {**params, "head": {"weight": params["embedding"]["weight"]}}
        if to == "gguf":
            write_gguf(target, config, params, stored.tokenizer, dtype)
        else:
            write = write_model if to == "jllama" else hf.write_folder
            write(target, config, params, stored.tokenizer, copied=copied)
    print(f"{target}: {to}, {dtype}, {count:,} parameters")


def _one_adapter(given: list[str]) -> str:
    """The path of the one adapter to merge."""
    (path, weight), *more = adapter_weights(given).items()
    if more or weight != 1.0:
        raise UserError(
            "--adapter: give one, with weight 1; adapters without full and dora merge one after the"
            " other into the result, the next as PEFT's (jllama convert NEXT DST --to peft); for"
            " other weights load them unmerged"
        )
    return path


def _merged(stored: StoredModel, to: str, written: str, asked: str | None) -> llama.Params:
    """The model with its one adapter merged; prints the error of rounding to the dtype."""
    (adapter,) = stored.adapters.values()
    dtype, scale_dtype, then = written, _scale_dtype(asked, to, stored), ""
    if to == "gguf":
        kinds = {kind: dtype for dtype, kind in _GGUF.items()}
        dtype, scale_dtype = kinds.get(written, "float32"), stored.scale_dtype
        then = "" if written in kinds else f", before it is written as {written}"
    base = read_on_host(stored, stored.dtype, stored.scale_dtype)
    config, overlay = adapter.read(stored.config, _host(), base)
    base = map_leaves(base, quantizer(stored.config, adapter.quantize))
    params, rounding = merge_overlay(config, base, overlay, dtype)
    say(
        f"merged {adapter.path.name}: its matrices changed by {rounding.change:.2g} of themselves;"
        f" rounded to {dtype}, they are off by {rounding.error:.2g}{then}"
    )
    return cast_params(params, dtype, scale_dtype)


def _opened(tokenizer: str | None) -> str | None:
    """The tokenizer to open: SRC's own one too where its files are copied."""
    return None if tokenizer == _COPY else tokenizer


def _copied(tokenizer: str | None, source: Found, to: str) -> dict[str, bytes] | None:
    """The tokenizer's files of SRC as they are, if they are to be copied."""
    if tokenizer != _COPY:
        return None
    names = [name for name in FILES if name in source.files]
    if to == "gguf" or not names:
        reason = "is for folders" if names else f"{source.path} has none of {', '.join(FILES)}"
        raise UserError(f"--tokenizer copy: {reason}; take none or a PATH")
    return {name: storage.read_bytes(source.folder / name) for name in names}


def _convert_adapter(args: argparse.Namespace, source: Found, target: Path) -> None:
    adapter = open_adapter(source, _opened(args.tokenizer))
    to = args.target_format or ("peft" if adapter.found.format == "jllama" else "jllama")
    if to not in ("jllama", "peft") or args.adapter is not None:
        raise UserError(
            f"{adapter.path}: is an adapter, which is converted to jllama or peft; to merge it into"
            f" its base: jllama convert BASE DST --adapter {adapter.path}"
        )
    if args.max_length is not None:
        raise UserError(f"--max-length: {adapter.path} is an adapter, whose length is its base's")
    if args.untie:
        raise UserError(f"--untie is for a model, and {adapter.path} is an adapter")
    if target.suffix == ".gguf":
        raise UserError(f"{target}: adapters are not written as GGUF; merge it into its base")
    if args.base_name is not None and to != "peft":
        raise UserError(f"--base-name {args.base_name}: only PEFT has it; leave it out")
    if args.base_name == "":
        raise UserError("--base-name is empty; give the name of a model, or leave it out")
    outputs.check_absent(target)
    copied = _copied(args.tokenizer, adapter.found, to)
    base = open_model(base_of(adapter, args.base), args.model, _opened(args.tokenizer))
    config = adapter.trained_config(base.config)
    if to == "peft" and config.rope != base.config.rope:
        say("note: it was trained with another model.rope than its base's, which PEFT cannot store")
    if to == "peft" and args.base_name is None and base.found.format == "jllama":
        say(
            f"note: PEFT opens no base of jllama's, such as {base.found.path}: convert that to hf"
            " too, and name it with --base-name"
        )
    tokenizer = adapter.tokenizer or base.tokenizer
    base = dataclasses.replace(base, config=config, tokenizer=tokenizer)
    params = read_on_host(base, base.dtype, base.scale_dtype)
    adapt, overlay = adapter.read(config, _host(), params)
    with outputs.stoppable(target):
        if to == "peft":
            name = args.base_name or str(base.place)
            peft_write.write_adapter(target, config, adapt, overlay, name, tokenizer, copied)
        else:
            write_adapter(target, base, params, adapt, overlay, copied)
    count = sum(x.size for x in jax.tree.leaves(overlay))
    print(f"{target}: {to}, an adapter of {count:,} parameters over {base.found.path}")


def _host() -> Placement:
    return Placement(make_mesh(MeshConfig(), jax.local_devices()[:1]), ShardingConfig())


def host_places(config: ModelConfig, dtype: str, scale_dtype: str) -> llama.Params:
    """`llama.placed_shapes` in host memory."""
    return llama.placed_shapes(config, _host(), dtype, scale_dtype)


def read_on_host(stored: StoredModel, dtype: str, scale_dtype: str) -> llama.Params:
    """The parameters in host memory, cast; UserError for a value that becomes infinite."""
    place = functools.partial(host_places, stored.config)
    if stored.found.format != "jllama":
        return stored.read(place(dtype, scale_dtype))
    # Orbax would cast too, but to infinity without an error.
    return cast_params(stored.read(place(stored.dtype, stored.scale_dtype)), dtype, scale_dtype)


def _scale_dtype(asked: str | None, to: str, stored: StoredModel) -> str:
    scales = asked or stored.scale_dtype
    return "float32" if to == "jllama" and scales == "float16" else scales


def _dtype(asked: str | None, to: str, stored: str) -> str:
    """The dtype to write: as asked, if the format has it; by default one that keeps all values."""
    if to == "gguf":
        return kind_of(_GGUF.get(asked or stored, asked))
    if asked is None:
        return "float32" if to == "jllama" and stored == "float16" else stored
    allowed = [dtype for dtype in _GGUF if (to, dtype) != ("jllama", "float16")]
    if asked not in allowed:
        gguf_too = f"; {asked} is a kind of FILE.gguf" if asked.upper() in KINDS else ""
        raise UserError(f"--dtype {asked}: {to} has {', '.join(allowed)}{gguf_too}")
    return asked
