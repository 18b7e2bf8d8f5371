"""Folders as Meta ships them: params.json and consolidated.NN.pth, a file per model-parallel shard.

params.json is incomplete: Llama-1 and 2 leave out rope_theta, Llama-3.1 has only a flag for the
scaling of RoPE, and no file has the length. So its values and the shapes of the tensors must be
those of exactly one model in configs/model, or of the model that the caller names.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jllama.config import ModelConfig
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.files import storage
from jllama.interop.json_config import Positive, Size, check, json_dataclass
from jllama.interop.names import META_PARAMS, NAMES, name_of
from jllama.interop.parameters import tie_tables
from jllama.interop.pth import read_pth
from jllama.interop.rope_formats import ROPE_FORMATS
from jllama.interop.tensors import Tensor, joined, repeated

_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_HEAD, _TABLE, _NORM, _GATE = (
    name_of(path).of("meta")
    for path in ("head.weight", "embedding.weight", "final_norm.scale", "layers.mlp.gate.kernel")
)
_DERIVED = {"rope.freqs"}  # a buffer that is no parameter


@json_dataclass
class _Params:
    """The keys of params.json. The tensors' shapes say what those of type Any do."""

    dim: Size
    n_layers: Size
    n_heads: Size
    n_kv_heads: Size | None = None
    vocab_size: int = -1  # LLaMA 1 and 2 leave it to the tokenizer
    norm_eps: Positive
    rope_theta: Positive | None = None
    use_scaled_rope: bool = False
    multiple_of: Any = None
    ffn_dim_multiplier: Any = None
    max_seq_len: Any = None
    max_batch_size: Any = None
    model_parallel_size: Any = None


def read_folder(
    folder: Path, files: Collection[str], model: str | ModelConfig | None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The architecture and the tensors of a folder, by their names in the files.

    No tensor is read, except the two tables of a tied model that has both, as Llama 3.2 does.

    Args:
      files: the names of the folder's files.
      model: a name in configs/model, a file like those, or a config; None finds the model.

    Raises UserError for what is missing, broken or contradictory, and if several models fit.
    """
    tensors = _tensors(folder, files)
    facts = _facts(folder / META_PARAMS, tensors)
    config = _model(folder, facts, model)
    if config.tie_embeddings and not tie_tables(tensors, "meta"):
        raise UserError(
            f"{folder}: {_HEAD} differs from {_TABLE}, and the model ties them; give --model FILE,"
            " a copy of it with tie_embeddings: false"
        )
    return config, tensors


def _tensors(folder: Path, files: Collection[str]) -> dict[str, Tensor]:
    files = sorted(name for name in files if _SHARD.fullmatch(name))
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(files))]
    if not files or files != expected:
        raise UserError(
            f"{folder}: expected consolidated.00.pth and on without a gap, not"
            f" {', '.join(files) or 'none'}"
        )
    shards = [read_pth(folder / name) for name in expected]
    for name, shard in zip(expected, shards, strict=True):
        if differing := sorted(shard.keys() ^ shards[0].keys()):
            raise UserError(
                f"{folder / name}: has other tensors than {expected[0]}: {differing[0]}"
            )
    norm = shards[0].get(_NORM)
    dim = math.prod(norm.shape) if norm else 0
    return {
        name: _joined(folder, name, tuple(shard[name] for shard in shards), dim)
        for name in shards[0]
        if name not in _DERIVED
    }


def _joined(folder: Path, name: str, parts: tuple[Tensor, ...], dim: int) -> Tensor:
    """A tensor made of its parts in all shards; `dim` is the model's width."""
    pattern = re.sub(r"\.\d+\.", ".{}.", name, count=1)
    split = next((n.split for n in NAMES if n.meta == pattern), None)
    first = parts[0]
    if len(parts) == 1 or split is None:
        return first if len(parts) == 1 else repeated(parts, f"{folder}: {name}")
    if any(len(part.shape) != 2 for part in parts):
        raise UserError(f"{folder}: {name}: {[list(p.shape) for p in parts]} are no matrices")
    # LLaMA 1 and 2 cut the embedding's width, Llama 3 its rows.
    if not name.startswith("layers."):
        split = 0 if first.shape[1] == dim else 1
    kinds = {p.shape[:split] + p.shape[split + 1 :] + (p.dtype,) for p in parts}
    if len(kinds) > 1:
        raise UserError(
            f"{folder}: {name}: its parts do not fit together: {sorted(map(str, kinds))}"
        )
    return joined(parts, split)


def _facts(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The values of `ModelConfig` that the folder tells, and use_scaled_rope."""
    values = storage.read_json(file)
    if unknown := sorted(values.keys() - {field.name for field in dataclasses.fields(_Params)}):
        raise UserError(f"{file}: {', '.join(unknown)}: unknown, and may change the model")
    params = check(_Params, values, file)

    def rows(name: str) -> int:
        if name not in tensors or len(tensors[name].shape) != 2:
            raise UserError(f"{file.parent}: {name} is missing, or no matrix")
        return tensors[name].shape[0]

    facts = {
        "vocab_size": rows(_TABLE),
        "hidden_dim": params.dim,
        "num_layers": params.n_layers,
        "num_heads": params.n_heads,
        "num_kv_heads": params.n_kv_heads or params.n_heads,
        "head_dim": params.dim // params.n_heads,
        "ffn_dim": rows(_GATE),
        "rms_norm_eps": params.norm_eps,
        "use_scaled_rope": params.use_scaled_rope,
    }
    if _HEAD not in tensors:  # a tied head may be in the file, too
        facts["tie_embeddings"] = True
    if params.rope_theta is not None:
        facts["rope_theta"] = params.rope_theta
    if params.vocab_size not in (-1, facts["vocab_size"]):
        raise UserError(
            f"{file}: vocab_size={params.vocab_size}, and {_TABLE} has {facts['vocab_size']:,} rows"
        )
    return facts


def _model(folder: Path, facts: dict[str, Any], given: str | ModelConfig | None) -> ModelConfig:
    if given is not None:
        if isinstance(given, str):
            model = recipes.load_model(given)
        else:  # a recipe's model, which may have other values of these two
            free = {k: facts[k] for k in ("rope_theta", "rms_norm_eps") if k in facts}
            model = dataclasses.replace(given, **free)
        if differing := _differences(facts, model):
            title = given if isinstance(given, str) else "the recipe's model"
            raise UserError(f"{folder}: is not {title}: {'; '.join(differing)}")
        return model
    shipped = {name: recipes.load_model(name) for name in recipes.model_names()}
    fitting = {
        name: model
        for name, model in shipped.items()
        if ROPE_FORMATS[model.rope.kind].meta is not None and not _differences(facts, model)
    }
    if len(set(fitting.values())) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise UserError(
            f"{folder}: may be {' or '.join(fitting)}, and params.json does not say which; name it:"
            " jllama convert --model NAME, or jllama.load(..., model=NAME)"
        )
    scaled = facts.pop("use_scaled_rope")
    values = ", ".join(f"{key}: {value}" for key, value in facts.items())
    raise UserError(
        f"{folder}: no model in configs/model has {values} and rope of kind"
        f" {'llama3' if scaled else 'none or linear'}; write a file like those, with the rope and"
        " max_length that are right: jllama convert --model FILE, or jllama.load(..., model=FILE)"
    )


def _differences(facts: dict[str, Any], model: ModelConfig) -> list[str]:
    values = dataclasses.asdict(model)
    values["use_scaled_rope"] = bool(ROPE_FORMATS[model.rope.kind].meta)
    return [
        f"{key} is {value} in the folder, {values[key]} in the model"
        for key, value in facts.items()
        if values[key] != value
    ]
