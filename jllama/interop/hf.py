"""Hugging Face folders: config.json, safetensors or PyTorch files, tokenizer; read and written."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jllama.config import ModelConfig
from jllama.errors import UserError
from jllama.files import outputs, storage
from jllama.interop.hf_config import generation_config, read_config, write_config
from jllama.interop.hf_tokenizer import export_note, tokenizer_files
from jllama.interop.json_config import shortened
from jllama.interop.names import HF_CONFIG, name_of
from jllama.interop.parameters import file_specs, file_tensors, tie_tables
from jllama.interop.pth import read_pth
from jllama.interop.safetensors import read_safetensors, write_safetensors
from jllama.interop.tensors import DTYPES, Tensor, nbytes
from jllama.model.llama import Params
from jllama.progress import Progress, note
from jllama.text.tokenizer import Tokenizer

# As in transformers, the first of these files that exists counts, and a file counts before its
# index, which names the file of each tensor.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HEAD = name_of("head.weight").of("hf")
# Old folders have this buffer, which is no parameter.
_DERIVED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# A folder of LlamaModel, the model without its head, has these names without "model.".
_INNER = re.compile(r"(embed_tokens|layers|norm)\.")
# Methods that quantise whole weights as they are loaded, and store them as they were.
_AS_LOADED = ("bitsandbytes", "eetq", "hqq", "quanto", "torchao")
SHARD_BYTES = 5_000_000_000


def read_architecture(folder: Path) -> ModelConfig:
    """The architecture in config.json; UserError if it is missing, broken or not expressible."""
    return read_config(storage.read_json(folder / HF_CONFIG), str(folder / HF_CONFIG))


def read_folder(folder: Path, files: Collection[str]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The architecture and the tensors of a folder, by the names of LlamaForCausalLM.

    No tensor is read, except the two tables of a model that ties them and has both. Raises
    UserError for what is missing, broken, or not expressible here.

    Args:
      files: the names of the folder's files.
    """
    values = storage.read_json(folder / HF_CONFIG)
    config = read_config(values, str(folder / HF_CONFIG))
    held = {n: t for n, t in _tensors(folder, files).items() if not _DERIVED.fullmatch(n)}
    inner = {n for n in held if _INNER.match(n) and f"model.{n}" not in held}
    tensors = {f"model.{n}" if n in inner else n: tensor for n, tensor in held.items()}
    _check_quantisation(values, tensors, folder)
    if config.tie_embeddings and not tie_tables(tensors, "hf"):
        raise UserError(
            f"{folder}: {_HEAD} differs from the embedding, and config.json ties them; set"
            " tie_word_embeddings to false there"
        )
    return config, tensors


def _check_quantisation(values: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path):
    """Raises UserError for quantised weights; whole ones may stand beside the key of a training."""
    key = next(
        (key for key in ("quantization_config", "compression_config") if values.get(key)), ""
    )
    if not key:
        return
    settings, where = values[key], folder / HF_CONFIG
    options = settings if isinstance(settings, dict) else {}
    # Files from before quant_method have these keys.
    is_4_or_8_bit = options.get("load_in_4bit") or options.get("load_in_8bit")
    method = options.get("quant_method") or ("bitsandbytes" if is_4_or_8_bit else "no quant_method")
    packed = next((n for n, tensor in tensors.items() if tensor.dtype not in DTYPES), None)
    if packed:
        raise UserError(
            f"{where}: {key} ({method}): the weights are quantised ({packed} is"
            f" {tensors[packed].dtype}); take the weights before quantisation"
        )
    if method not in _AS_LOADED:
        raise UserError(
            f"{where}: {key} is {shortened(settings)}, which cannot be expressed here; the weights"
            " are not packed: if they are the whole model's, take the key out"
        )
    note(f"{where}: {key} ({method}) has no effect: the weights are not quantised")


def _tensors(folder: Path, files: Collection[str]) -> Mapping[str, Tensor]:
    for name in _WEIGHTS:
        if name in files:
            return _read(folder / name)
        index = f"{name}.index.json"
        if index in files:
            return _indexed(folder / index, files)
    if "quantize_config.json" in files:  # AutoGPTQ's, whose weights have names of its own
        raise UserError(f"{folder}: is quantised with GPTQ; take the model before quantisation")
    raise UserError(
        f"{folder}: no weights: expected {' or '.join(_WEIGHTS)}, or its .index.json with its files"
    )


def _read(file: Path) -> dict[str, Tensor]:
    return (read_safetensors if file.suffix == ".safetensors" else read_pth)(file)


def _indexed(index: Path, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of the files that an index names, as transformers takes them.

    A tensor counts though the index says another file of these, or none. Which of them are missing
    is known once they are compared with the architecture: a tied head may be listed and absent.

    Args:
      names: those of the folder's files.
    """
    file_of = storage.read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files")
    paths = {file: PurePosixPath(file) for file in sorted(set(file_of.values()))}
    for file, path in paths.items():
        if path.is_absolute() or ".." in path.parts or not path.name or "\\" in file:
            raise UserError(f"{index}: {file!r} is not the name of a file in this folder")
    missing = [
        file
        for file, path in paths.items()
        if str(path) not in names
        and (len(path.parts) == 1 or not storage.exists(index.parent / path))
    ]
    if missing:
        raise UserError(f"{index}: names files that are not there: {', '.join(missing)}")
    tensors: dict[str, Tensor] = {}
    for file, path in paths.items():
        held = _read(index.parent / path)
        # Of two files that hold a tensor counts the one that the index names.
        tensors |= {n: t for n, t in held.items() if n not in tensors or file_of.get(n) == file}
    return tensors


def check_expressible(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raises UserError if Hugging Face's LLaMA cannot express the model."""
    write_config(config, "float32", tokenizer)


def write_folder(
    folder: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    shard_bytes: int = SHARD_BYTES,
    copied: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a folder that transformers reads, whole or not at all, in the parameters' dtypes.

    Args:
      tokenizer: without one its files are left out, and config.json has no ids of BOS and EOS.
      copied: by name the files to write in place of those that are made of the tokenizer.

    Raises UserError if the folder holds anything, or Hugging Face's LLaMA cannot express the model.
    """
    specs = file_specs(config)
    tensors = file_tensors(params, specs, "hf", interleaved=False)
    files = {
        HF_CONFIG: write_config(config, params["embedding"]["weight"].dtype.name, tokenizer),
        "generation_config.json": generation_config(tokenizer),
    }
    shards = _shards(tensors, shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total = sum(map(nbytes, tensors.values()))
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        files["model.safetensors.index.json"] = {
            "metadata": {"total_size": total},
            "weight_map": {t: n for n, shard in zip(names, shards, strict=True) for t in shard},
        }
    data = {name: json.dumps(text, indent=2).encode() + b"\n" for name, text in files.items()}
    if copied is not None:
        data |= copied
    elif tokenizer is not None:
        data |= tokenizer_files(tokenizer)
        if line := export_note(tokenizer):
            note(f"{folder}: {line}")
    with outputs.new_folder(folder, last=HF_CONFIG) as new:
        with Progress(f"write {folder.name}", total) as progress:
            for name, shard in zip(names, shards, strict=True):
                write_safetensors(new / name, shard, progress)
        for name, text in data.items():
            storage.write_bytes(new / name, text)


def _shards(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """The tensors of each file, in order: at most `most` bytes together, or a single tensor."""
    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        size = nbytes(tensor)
        if size > room or not shards:
            shards.append({})
            room = most
        shards[-1][name] = tensor
        room -= size
    return shards
