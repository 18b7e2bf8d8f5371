"""Hugging Face folders: config.json, safetensors or PyTorch files, tokenizer; read and written."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jllama.config import ModelConfig
from jllama.errors import UserError
from jllama.files import outputs, storage
from jllama.interop.hf_config import generation_config, read_config, write_config
from jllama.interop.hf_tokenizer import tie_warning, tokenizer_files
from jllama.interop.names import HF_CONFIG, name_of
from jllama.interop.parameters import drop_tied_head, file_specs, file_tensors
from jllama.interop.pth import read_pth
from jllama.interop.safetensors import read_safetensors, write_safetensors
from jllama.interop.tensors import Tensor, nbytes
from jllama.model.llama import Params
from jllama.progress import Progress, say
from jllama.text.tokenizer import Tokenizer

# As in transformers, the first of these files that exists counts, and a file counts before its
# index, which names the file of each tensor.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HEAD = name_of("head.weight").of("hf")
# Old folders have this buffer, which is no parameter.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
SHARD_BYTES = 5_000_000_000


def read_architecture(folder: Path) -> ModelConfig:
    """The architecture in config.json; UserError if it is missing, broken or not expressible."""
    return read_config(storage.read_json(folder / HF_CONFIG), str(folder / HF_CONFIG))


def read_folder(folder: Path, files: Collection[str]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The architecture and the tensors of a folder, by their names in the files.

    No tensor is read, except the two tables of a model that ties them and has both. Raises
    UserError for what is missing, broken, or not expressible here.

    Args:
      files: the names of the folder's files.
    """
    config = read_architecture(folder)
    tensors = {n: t for n, t in _tensors(folder, files).items() if not _DERIVED.fullmatch(n)}
    if config.tie_embeddings and not drop_tied_head(tensors, "hf"):
        raise UserError(
            f"{folder}: {_HEAD} differs from the embedding, and config.json ties them; set"
            " tie_word_embeddings to false there"
        )
    return config, tensors


def _tensors(folder: Path, files: Collection[str]) -> Mapping[str, Tensor]:
    for name in _WEIGHTS:
        read = read_safetensors if name.endswith(".safetensors") else read_pth
        if name in files:
            return read(folder / name)
        index = f"{name}.index.json"
        if index in files:
            return _indexed(folder / index, files, read)
    raise UserError(
        f"{folder}: no weights: expected {' or '.join(_WEIGHTS)}, or its .index.json with its files"
    )


def _indexed(index: Path, names: Iterable[str], read: Any) -> dict[str, Tensor]:
    """The tensors of several files; `names` are those of the folder's files."""
    file_of = storage.read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files")
    files = sorted(set(file_of.values()))
    outside = [file for file in files if PurePosixPath(file).name != file or "\\" in file]
    if outside:
        raise UserError(f"{index}: {outside[0]!r} is not the name of a file in this folder")
    missing = [file for file in files if file not in names]
    if missing:
        raise UserError(f"{index}: names files that are not there: {', '.join(missing)}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        held = read(index.parent / file)
        listed = {name for name, listed_file in file_of.items() if listed_file == file}
        if lost := sorted(listed - held.keys()):
            raise UserError(f"{index}: {file} does not hold {', '.join(lost)}")
        # A tensor that the index leaves out is kept, to be reported as extra. A tensor that two
        # files hold is taken from the one that the index names.
        tensors |= {n: t for n, t in held.items() if file_of.get(n, file) == file}
    return tensors


def check_expressible(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raises UserError if Hugging Face's LLaMA cannot express the model or its tokenizer."""
    write_config(config, "float32", tokenizer)
    if tokenizer is not None:
        tokenizer_files(tokenizer)


def write_folder(
    folder: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that transformers reads, whole or not at all, in the parameters' dtypes.

    Without a tokenizer its files are left out. Raises UserError if the folder holds anything, or
    Hugging Face's LLaMA cannot express the model.
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
    if tokenizer is not None:
        data |= tokenizer_files(tokenizer)
        if warning := tie_warning(tokenizer):
            say(f"note: {folder}: {warning}")
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
