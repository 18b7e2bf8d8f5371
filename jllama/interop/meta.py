"""Folders as Meta ships them: params.json and consolidated.NN.pth, a file per model-parallel shard.

params.json does not say everything: Llama-1 and 2 leave the base of RoPE out, Llama-3.1 its scaling
but for a flag, none the length. So what it says, and the shapes, must be those of one model in
configs/model, or of the model that is named.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jllama import recipe as recipes
from jllama import storage
from jllama.config import Llama3RopeScaling, ModelConfig
from jllama.errors import UserError
from jllama.interop.names import NAMES
from jllama.interop.pth import read_pth
from jllama.interop.tensors import FileTensor, JoinedTensor, Tensor

PARAMS = "params.json"
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_DERIVED = {"rope.freqs"}  # a buffer, no parameter
# What params.json may say: the sizes, what the sizes of the tensors say as well, and nothing else.
_KNOWN = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta",
    "use_scaled_rope", "multiple_of", "ffn_dim_multiplier", "max_seq_len", "max_batch_size",
    "model_parallel_size",
}  # fmt: skip


def read_folder(folder: Path, model: str | None) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The architecture and the tensors of a folder, by their names there; none of their data is
    read.

    Args:
      model: a name in configs/model, or a file like those; None to find it.

    Raises UserError for what is missing, broken or contradictory, and when the model is unclear.
    """
    tensors = _tensors(folder)
    facts = _facts(folder / PARAMS, tensors)
    return _model(folder, facts, model), tensors


def _tensors(folder: Path) -> dict[str, Tensor]:
    found = [name for name in storage.names(folder) if _SHARD.fullmatch(name)]
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(found))]
    if not found or sorted(found) != expected:
        there = ", ".join(sorted(found)) or "none"
        raise UserError(f"{folder}: expected consolidated.00.pth and on without a gap: {there}")
    shards = [read_pth(folder / name) for name in expected]
    for name, shard in zip(expected, shards, strict=True):
        if other := sorted(shard.keys() ^ shards[0].keys()):
            raise UserError(f"{folder / name}: has other tensors than {expected[0]}: {other[0]}")
    dim = next((t.shape for n, t in shards[0].items() if n == "norm.weight"), (0,))[0]
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
        return first
    # LLaMA 1 and 2 cut the embedding's width, Llama 3 its rows.
    if not name.startswith("layers.") and len(first.shape) == 2:
        split = 0 if first.shape[1] == dim else 1
    rest = {p.shape[:split] + p.shape[split + 1 :] + (p.dtype,) for p in parts}
    if len(rest) > 1:
        raise UserError(
            f"{folder}: {name}: its parts do not fit together: {sorted(map(str, rest))}"
        )
    return JoinedTensor(parts, split)


def _facts(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the folder says of the model, by the names of `ModelConfig`."""
    try:
        params = json.loads(storage.read_text(file))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not readable as JSON: {storage.one_line(e)}") from None
    if not isinstance(params, dict):
        raise UserError(f"{file}: expected a JSON object")
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

    heads = number("n_heads")
    facts = {
        "vocab_size": rows("tok_embeddings.weight"),
        "hidden_dim": number("dim"),
        "num_layers": number("n_layers"),
        "num_heads": heads,
        "num_kv_heads": number("n_kv_heads") if params.get("n_kv_heads") else heads,
        "head_dim": number("dim") // heads,
        "ffn_dim": rows("layers.0.feed_forward.w1.weight"),
        "rms_norm_eps": number("norm_eps", (int, float)),
        "tie_embeddings": "output.weight" not in tensors,
        "use_scaled_rope": bool(params.get("use_scaled_rope", False)),
    }
    if params.get("rope_theta") is not None:
        facts["rope_theta"] = float(number("rope_theta", (int, float)))
    return facts


def _model(folder: Path, facts: dict[str, Any], name: str | None) -> ModelConfig:
    if name is not None:
        model = recipes.load_model(name)
        wrong = _differences(facts, model)
        if wrong:
            raise UserError(f"{folder}: is not {name}: {'; '.join(wrong)}")
        return model
    shipped = {name: recipes.load_model(name) for name in recipes.model_names()}
    fitting = {name: model for name, model in shipped.items() if not _differences(facts, model)}
    if len(set(fitting.values())) == 1:
        return next(iter(fitting.values()))
    said = ", ".join(f"{key}={value}" for key, value in facts.items())
    if fitting:
        raise UserError(
            f"{folder}: may be {' or '.join(fitting)}, which differ in what params.json does not"
            " say; name it with --model"
        )
    raise UserError(
        f"{folder}: no model in configs/model has {said}; give --model FILE, a copy of one of them"
        " with these values and the right rope and max_length"
    )


def _differences(facts: dict[str, Any], model: ModelConfig) -> list[str]:
    values = dataclasses.asdict(model)
    values["use_scaled_rope"] = isinstance(model.rope, Llama3RopeScaling)
    return [
        f"{key} is {value} here, {values[key]} there"
        for key, value in facts.items()
        if values[key] != value
    ]
