"""Folders as Meta ships them: params.json and consolidated.NN.pth, a file per model-parallel shard.

params.json does not say everything: Llama-1 and 2 leave the base of RoPE out, Llama-3.1 its scaling
but for a flag, none the length. So what it says, and the shapes, must be those of one model in
configs/model, or of the model that is named.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jllama.config import Llama3RopeScaling, ModelConfig
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.files import storage
from jllama.interop.names import META_PARAMS, NAMES, name_of
from jllama.interop.parameters import drop_tied_head
from jllama.interop.pth import read_pth
from jllama.interop.tensors import FileTensor, JoinedTensor, RepeatedTensor, Tensor

PARAMS = META_PARAMS
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_HEAD, _TABLE, _NORM, _GATE = (
    name_of(path).of("meta")
    for path in ("head.weight", "embedding.weight", "final_norm.scale", "layers.mlp.gate.kernel")
)
_DERIVED = {"rope.freqs"}  # a buffer, no parameter
# What params.json may say: the sizes, what the sizes of the tensors say as well, and nothing else.
# Of the scalings, those that Meta published.
_ROPES = ("none", "llama3")
_KNOWN = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta",
    "use_scaled_rope", "multiple_of", "ffn_dim_multiplier", "max_seq_len", "max_batch_size",
    "model_parallel_size",
}  # fmt: skip


def read_folder(
    folder: Path, files: Collection[str], model: str | ModelConfig | None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The architecture and the tensors of a folder, by their names there; no data is read but a
    second copy of a tied head, which Llama 3.2 has.

    Args:
      files: their names in the folder.
      model: a name in configs/model, a file like those, or what they say; None to find it.

    Raises UserError for what is missing, broken or contradictory, and when the model is unclear.
    """
    tensors = _tensors(folder, files)
    facts = _facts(folder / PARAMS, tensors)
    config = _model(folder, facts, model)
    if config.tie_embeddings and not drop_tied_head(tensors, "meta"):
        raise UserError(
            f"{folder}: {_HEAD} differs from {_TABLE}, and the model ties them; give --model FILE,"
            " a copy of it with tie_embeddings: false"
        )
    return config, tensors


def _tensors(folder: Path, files: Collection[str]) -> dict[str, Tensor]:
    found = [name for name in files if _SHARD.fullmatch(name)]
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(found))]
    if not found or sorted(found) != expected:
        there = ", ".join(sorted(found)) or "none"
        raise UserError(f"{folder}: expected consolidated.00.pth and on without a gap: {there}")
    shards = [read_pth(folder / name) for name in expected]
    for name, shard in zip(expected, shards, strict=True):
        if other := sorted(shard.keys() ^ shards[0].keys()):
            raise UserError(f"{folder / name}: has other tensors than {expected[0]}: {other[0]}")
    norm = shards[0].get(_NORM)
    dim = math.prod(norm.shape) if norm else 0
    return {
        name: _joined(folder, name, tuple(shard[name] for shard in shards), dim)
        for name in shards[0]
        if name not in _DERIVED
    }


def _joined(folder: Path, name: str, parts: tuple[FileTensor, ...], dim: int) -> Tensor:
    """A tensor from its parts in every shard; `dim` is the model's width."""
    pattern = re.sub(r"\.\d+\.", ".{}.", name, count=1)
    split = next((n.split for n in NAMES if n.meta == pattern), None)
    first = parts[0]
    if len(parts) == 1 or split is None:
        return first if len(parts) == 1 else RepeatedTensor(parts)
    if any(len(part.shape) != 2 for part in parts):
        raise UserError(f"{folder}: {name}: {[list(p.shape) for p in parts]} are no matrices")
    # LLaMA 1 and 2 cut the embedding's width, Llama 3 its rows.
    if not name.startswith("layers."):
        split = 0 if first.shape[1] == dim else 1
    rest = {p.shape[:split] + p.shape[split + 1 :] + (p.dtype,) for p in parts}
    if len(rest) > 1:
        raise UserError(
            f"{folder}: {name}: its parts do not fit together: {sorted(map(str, rest))}"
        )
    return JoinedTensor(parts, split)


def _facts(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the folder says of the model, by the names of `ModelConfig`."""
    params = storage.read_json(file)
    if unknown := sorted(params.keys() - _KNOWN):
        raise UserError(f"{file}: {', '.join(unknown)}: not expressible here")

    def number(key: str, kind: type | tuple[type, ...] = int) -> Any:
        value = params.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{file}: {key}={value!r}: expected a positive number")
        return value

    def rows(name: str) -> int:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise UserError(f"{file.parent}: {name} is missing, or no matrix")
        return tensors[name].shape[0]

    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise UserError(f"{file}: use_scaled_rope={scaled!r}: expected true or false")
    heads = number("n_heads")
    facts = {
        "vocab_size": rows(_TABLE),
        "hidden_dim": number("dim"),
        "num_layers": number("n_layers"),
        "num_heads": heads,
        "num_kv_heads": heads if params.get("n_kv_heads") is None else number("n_kv_heads"),
        "head_dim": number("dim") // heads,
        "ffn_dim": rows(_GATE),
        "rms_norm_eps": number("norm_eps", (int, float)),
        "use_scaled_rope": scaled,
    }
    if _HEAD not in tensors:  # a tied one may be there, too
        facts["tie_embeddings"] = True
    if params.get("rope_theta") is not None:
        facts["rope_theta"] = number("rope_theta", (int, float))
    said = params.get("vocab_size", -1)  # LLaMA 1 and 2 leave it to the tokenizer
    if said not in (-1, facts["vocab_size"]):
        raise UserError(
            f"{file}: vocab_size={said!r}, and {_TABLE} has {facts['vocab_size']:,} rows"
        )
    return facts


def _model(folder: Path, facts: dict[str, Any], given: str | ModelConfig | None) -> ModelConfig:
    if given is not None:
        if isinstance(given, str):
            model = recipes.load_model(given)
        else:  # a recipe's, which says where it shall be another
            free = {k: facts[k] for k in ("rope_theta", "rms_norm_eps") if k in facts}
            model = dataclasses.replace(given, **free)
        wrong = _differences(facts, model)
        if wrong:
            what = given if isinstance(given, str) else "the recipe's model"
            raise UserError(f"{folder}: is not {what}: {'; '.join(wrong)}")
        return model
    shipped = {name: recipes.load_model(name) for name in recipes.model_names()}
    fitting = {
        name: model
        for name, model in shipped.items()
        if model.rope.kind in _ROPES and not _differences(facts, model)
    }
    if len(set(fitting.values())) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise UserError(
            f"{folder}: may be {' or '.join(fitting)}, which differ in what params.json does not"
            " say; name it: jllama convert --model NAME, or jllama.load(..., model=NAME)"
        )
    scaled = facts.pop("use_scaled_rope")
    said = ", ".join(f"{key}: {value}" for key, value in facts.items())
    raise UserError(
        f"{folder}: no model in configs/model has {said} and rope of kind"
        f" {'llama3' if scaled else 'none or linear'}; write a file like those, with the rope and"
        " max_length that are right: jllama convert --model FILE, or jllama.load(..., model=FILE)"
    )


def _differences(facts: dict[str, Any], model: ModelConfig) -> list[str]:
    values = dataclasses.asdict(model)
    values["use_scaled_rope"] = isinstance(model.rope, Llama3RopeScaling)
    return [
        f"{key} is {value} here, {values[key]} there"
        for key, value in facts.items()
        if values[key] != value
    ]
