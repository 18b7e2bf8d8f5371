"""`jllama convert`: a model from one format to another."""

import argparse

import jax

from jllama import flops, storage
from jllama.config import MeshConfig, ShardingConfig
from jllama.errors import UserError
from jllama.interop.gguf import KINDS, kind_of, write_gguf
from jllama.interop.hf import write_folder
from jllama.model import llama
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.train.stored import open_model, write_model

# What GGUF calls the dtypes that a folder may have.
_GGUF = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="a run, a step or a model's folder; Hugging Face's, Meta's")
    add("target", metavar="DST", help="a folder that is not there yet, or a file FILE.gguf")
    add("--from", dest="source_format", choices=("jllama", "hf", "meta"), help="[found by looking]")
    add(
        "--to",
        dest="target_format",
        choices=("jllama", "hf", "gguf"),
        help="[gguf for a name that ends so; else hf of ours, and ours of any other]",
    )
    add(
        "--dtype",
        metavar="DTYPE",
        help=f"{', '.join(_GGUF)}; for GGUF {', '.join(KINDS)} [as stored]",
    )
    add("--model", metavar="NAME", help="what a folder of Meta's is, where it does not say all")


def run(args: argparse.Namespace) -> None:
    target = storage.path(args.target)
    stored = open_model(storage.path(args.source), args.source_format, args.model)
    to = args.target_format
    if to is None:
        own = "hf" if stored.format == "jllama" else "jllama"
        to = "gguf" if target.suffix == ".gguf" else own
    dtype = _dtype(args.dtype, to, stored.dtype)
    storage.check_absent(target)
    # The host's memory, and not that of its accelerators, is what a model passes through.
    host = Placement(
        make_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1]), ShardingConfig()
    )
    held = (dtype, dtype) if to == "jllama" else (stored.dtype, stored.scale_dtype)
    params = stored.read(llama.placed_shapes(stored.config, host, *held))
    match to:
        case "jllama":
            write_model(target, stored.config, params, stored.tokenizer, dtype)
        case "hf":
            write_folder(target, stored.config, params, stored.tokenizer, dtype)
        case "gguf":
            write_gguf(target, stored.config, params, stored.tokenizer, dtype)
    print(f"{target}: {to}, {dtype}, {flops.parameter_count(stored.config):,} parameters")


def _dtype(asked: str | None, to: str, stored: str) -> str:
    """What to write: as asked, if the format has it; else what holds the stored values exactly."""
    if to == "gguf":
        return kind_of(_GGUF.get(asked or stored, asked))
    if asked is None:
        return "float32" if to == "jllama" and stored == "float16" else stored
    allowed = [dtype for dtype in _GGUF if (to, dtype) != ("jllama", "float16")]
    if asked not in allowed:
        raise UserError(f"--dtype {asked}: {to} has {', '.join(allowed)}")
    return asked
