"""Adapters on storage: a run that trains an overlay, a folder of one alone, and PEFT's.

Ours have `adapt` in their config.yaml, the overlay where others have their parameters, and
base.json, which says what it is an overlay of; PEFT's have adapter_config.json.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jllama.adapt import quant
from jllama.adapt.lora import Overlay, overlay_specs
from jllama.adapt.vocab import resized
from jllama.config import ComputeConfig, LoraConfig, ModelConfig, StoredConfig
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.files import storage
from jllama.interop import peft, peft_config
from jllama.model import llama
from jllama.model.param import EachLeaf
from jllama.parallel.sharding import Placement
from jllama.store.checkpoint import Checkpoints, latest_step, load_params, room_for
from jllama.store.fingerprint import Fingerprint, fingerprint
from jllama.store.model import (
    FREE,
    RECIPE,
    ModelFormat,
    StoredModel,
    differences,
    open_model,
    own_folder,
    run_and_step,
)
from jllama.text.tokenizer import Tokenizer, find_tokenizer

BASE = "base.json"
_FACTORS = ComputeConfig(dtype="float32")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that was found; its overlay is not read yet.

    Attributes:
      base: the model that it adapts, as was said where it was made.
      quantize: what the base's matrices were quantised to when it was trained.
      tokenizer: its own; None where it has none.
    """

    path: Path
    format: Literal["jllama", "peft"]
    base: str
    quantize: str
    tokenizer: Tokenizer | None
    _stored: StoredConfig | None
    _fingerprint: str | None

    @property
    def dtype(self) -> str | None:
        """Of the computation that it was trained in; None where nobody says."""
        trained = self._stored is not None and self._stored.run is not None
        return self._stored.compute.dtype if trained else None

    def lora(self, config: ModelConfig) -> LoraConfig:
        """What it trains of the model. Raises UserError where it is another model's."""
        if self._stored is not None:
            return self._stored.adapt
        return peft.read_lora(self.path, config.unpadded)

    def over(self, base: ModelConfig) -> ModelConfig:
        """The base as it was computed, and its tables padded, while the adapter was trained."""
        if self._stored is None:
            return base
        keys = (*FREE, "max_length", "vocab_multiple")
        return dataclasses.replace(base, **{k: getattr(self._stored.model, k) for k in keys})

    def read(
        self,
        config: ModelConfig,
        placement: Placement,
        base: llama.Params,
        digest: str | None = None,
    ) -> tuple[LoraConfig, Overlay]:
        """Its config and its overlay, float32, over the base's parameters.

        Without a `digest`, which `read_base` gives, they are not quantised yet.

        Raises UserError where it was made for another base: of other shapes, or of other values.
        """
        if self._stored is None:
            there = resized(base, config.vocab_size)
            lora, host = peft.read_adapter(self.path, config.unpadded, there)
            host = resized(host, config.vocab_rows)
        else:
            lora = self._stored.adapt
            self._check(config, digest or fingerprint(base, "bfloat16"))
        placed = llama.place(overlay_specs(config, _FACTORS, lora), placement, "float32", "float32")
        if self._stored is None:
            return lora, jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), host, placed)
        folder, step = run_and_step(self.path)
        return lora, load_params(folder, step, placed)

    def _check(self, config: ModelConfig, digest: str) -> None:
        changed, said = differences(self._stored.model, config)
        if changed:
            raise UserError(
                f"{self.path}: is an adapter of another model, {self.base}: {'; '.join(said)}"
            )
        if digest != self._fingerprint:
            raise UserError(
                f"{self.path}: was trained over other parameters than these, of the same shapes:"
                f" over {self.base} as it was then; give that as the base"
            )


def adapter_weights(given: Sequence[str]) -> dict[str, float]:
    """The weight of each path of `--adapter PATH[=WEIGHT]`, 1 unless said.

    Raises UserError for what is no weight, and a path that is given twice.
    """
    weights: dict[str, float] = {}
    for text in given:
        path, equals, weight = text.rpartition("=")
        try:
            path, number = (path, float(weight)) if equals else (text, 1.0)
        except ValueError:
            raise UserError(f"--adapter {text}: {weight!r} is no weight") from None
        if path in weights:
            raise UserError(f"--adapter {path}: is given twice; weigh it once")
        weights[path] = number
    return weights


def is_adapter(path: Path) -> bool:
    """Whether a folder, or a step of a run, holds an adapter and not a model."""
    if storage.exists(path / peft_config.CONFIG):
        return True
    return _is_ours(path) and isinstance(_stored(run_and_step(path)[0]).adapt, LoraConfig)


def _is_ours(path: Path) -> bool:
    of_a_run = path.name.isdecimal() and path.parent.name == "checkpoints"
    return storage.exists(path / RECIPE) or of_a_run


def open_adapter(path: Path) -> Adapter:
    """Finds out what an adapter is. Raises UserError if it is none."""
    if storage.exists(path / peft_config.CONFIG):
        base = storage.read_json(path / peft_config.CONFIG).get("base_model_name_or_path")
        return Adapter(path, "peft", str(base or ""), "none", find_tokenizer(path), None, None)
    stored = _stored(run_and_step(path)[0]) if _is_ours(path) else None
    if stored is None or not isinstance(stored.adapt, LoraConfig):
        what = "a model and no adapter" if stored or storage.is_folder(path) else "no such folder"
        raise UserError(
            f"{path}: {what}; expected a run with adapt.kind=lora, or a folder of PEFT's"
            " (adapter_config.json)"
        )
    folder, _ = run_and_step(path)
    said = base_of(folder)
    if said is None:
        raise UserError(f"{folder}: base.json is missing, which says what the adapter is one of")
    tokenizer = find_tokenizer(folder)
    return Adapter(
        path, "jllama", said["model"], stored.adapt.quantize, tokenizer, stored, said["fingerprint"]
    )


def _stored(folder: Path) -> StoredConfig:
    return recipes.load_stored(folder / RECIPE)


def base_path(adapter: Adapter, given: str | None = None) -> Path:
    """The path of the base: the given one, or where the adapter says that it is.

    Raises UserError if it is not there.
    """
    path = storage.path(given or adapter.base)
    if given or (adapter.base and storage.is_folder(path)):
        return path
    raise UserError(
        f"{adapter.path}: is an adapter of {adapter.base or 'a model that it does not name'}, which"
        " is not a folder here; say where that is (load(BASE, adapter=...), --model BASE"
        " --adapter ..., convert or info --base BASE, adapt.base in a recipe)"
    )


def open_adapted(
    path: Path,
    adapters: Mapping[str, Path] | None = None,
    format: ModelFormat | None = None,
    model: str | None = None,
) -> tuple[StoredModel, dict[str, Adapter]]:
    """A model with adapters over it, by name, or an adapter with its base.

    The model is as the adapters were trained over it: RoPE and length, padding, dtype of the
    computation, and their tokenizer, where they all have the same. Raises UserError if they are of
    several kinds that cannot be had together; `format` and `model` are those of `open_model`.
    """
    if adapters is None and is_adapter(path):
        adapters, path = {path.name: path}, base_path(open_adapter(path))
    found = {name: open_adapter(where) for name, where in (adapters or {}).items()}
    stored = open_model(path, format, model)
    for what, values in (
        ("bases kept in", {a.quantize for a in found.values()}),
        (
            "several of model.rope, rope_theta, rms_norm_eps, max_length and vocab_multiple:",
            {a.over(stored.config) for a in found.values()},
        ),
    ):
        if len(values) > 1:
            named = " and ".join(sorted(v if isinstance(v, str) else repr(v.rope) for v in values))
            raise UserError(f"adapters: trained over {what} {named}; load them apart")
    config = next((a.over(stored.config) for a in found.values()), stored.config)
    tokenizers = {a.tokenizer.digest: a.tokenizer for a in found.values() if a.tokenizer}
    dtypes = {a.dtype for a in found.values() if a.dtype}
    changes = {"config": config}
    if len(tokenizers) == 1:
        changes["tokenizer"] = tokenizers.popitem()[1]
    if len(dtypes) == 1:
        changes["compute"] = dataclasses.replace(stored.compute, dtype=dtypes.pop())
    return dataclasses.replace(stored, **changes), found


def note_base(folder: Path, model: str, digest: str) -> None:
    """Writes which parameters the overlay in this folder adapts.

    Raises UserError if it has a checkpoint over others.
    """
    before = base_of(folder) if latest_step(folder) is not None else None
    if before and before["fingerprint"] != digest:
        raise UserError(
            f"training.init_from={model}: its parameters are not those that the run in {folder}"
            f" began with ({before['model']}); bring them back, or choose another run.name"
        )
    said = {"model": model, "fingerprint": digest}
    storage.write_text(folder / BASE, json.dumps(said, indent=1) + "\n")


def base_of(folder: Path) -> dict[str, str] | None:
    """The {"model", "fingerprint"} that `note_base` wrote; None where nothing is written."""
    if not storage.exists(folder / BASE):
        return None
    try:
        said = json.loads(storage.read_text(folder / BASE))
        return {key: str(said[key]) for key in ("model", "fingerprint")}
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder / BASE}: not readable, the base is unknown: {e!r}") from None


def write_adapter(
    folder: Path,
    base: StoredModel,
    params: llama.Params,
    lora: LoraConfig,
    overlay: Overlay,
) -> None:
    """Writes an adapter alone in this project's format, whole or not at all.

    Args:
      base, params: what it adapts, and its parameters.
    """
    stored = StoredConfig(model=base.config, compute=_FACTORS, adapt=lora)
    with own_folder(folder) as new:
        checkpoints = Checkpoints(new, keep=1, copies=room_for(overlay))
        checkpoints.save(0, trainable=overlay)
        checkpoints.close()
        note_base(new, str(storage.absolute(base.place)), fingerprint(params, "bfloat16"))
        if base.tokenizer is not None:
            base.tokenizer.save(new)
        storage.write_text(new / RECIPE, recipes.to_yaml(stored))


def quantizer(config: ModelConfig, kind: str) -> EachLeaf:
    """How the base is kept that an adapter was trained over; what it is given is used up."""
    return quant.quantizer(llama.param_specs(config, _FACTORS), kind)


def read_base(base: StoredModel, placed: llama.Params, keep: EachLeaf) -> tuple[llama.Params, str]:
    """What is kept of the base's parameters, each before the next is read; and the fingerprint
    that an adapter knows them by.

    Args:
      placed: `llama.placed_shapes`.
    """
    digest = Fingerprint("bfloat16")

    def each(path: str, x: jax.Array) -> Any:
        digest.add(path, x)
        return keep(path, x)

    return base.read(placed, each), str(digest)
