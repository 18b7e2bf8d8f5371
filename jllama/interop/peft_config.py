"""PEFT's adapter_config.json, read and written; defaults are those of peft 0.21.2."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from jllama.config import (
    Beta,
    Count,
    LoraConfig,
    PositiveFloat,
    PositiveInt,
)
from jllama.errors import UserError
from jllama.files import storage
from jllama.interop.names import PEFT_CONFIG
from jllama.progress import say

CONFIG = PEFT_CONFIG
MERGE = "merge it into its base with peft (merge_and_unload), and convert the merged model"
# Initialisations that change the base, and from which peft can convert.
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")
_CONVERT = (
    "its factors belong to a base that was changed when it began; save it with peft's"
    " path_initial_model_for_weight_conversion, or " + MERGE
)
NO_TARGETS = "dummy-target-modules"  # peft's name for an adapter that has no low-rank part
# What changes the function and cannot be expressed, with the values at which it does not.
_NEUTRAL: dict[str, tuple] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "task_type": ("CAUSAL_LM", None),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "megatron_config": (None,),
}
_REMEDIES = {
    "bias": 'where it has no tensor named bias, write "none" there; else ' + MERGE,
    "fan_in_fan_out": "LLaMA's matrices are [outputs, inputs]; write false there if its are, too",
    "task_type": "only CAUSAL_LM has the head of a language model",
    "alora_invocation_tokens": "an adapter that works from some token on cannot be expressed",
    "arrow_config": "a router among adapters cannot be expressed",
    "monteclora_config": "noise among the weights cannot be expressed",
}
# Initialisations that leave the base as it was.
_SOUND_INITS = ("True", "False", "None", "gaussian", "eva", "orthogonal", "mica")
# Keys that say nothing of the function.
_SILENT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "velora_config",
}  # fmt: skip

_Names = tuple[str, ...]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config={"extra": "ignore"})
class PeftConfig:
    """What decides the function."""

    r: PositiveInt = 8
    lora_alpha: PositiveFloat = 8.0
    lora_dropout: Beta = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: _Names | str | None = None
    exclude_modules: _Names | str | None = None
    modules_to_save: _Names | None = None
    layers_to_transform: tuple[Count, ...] | Count | None = None
    layers_pattern: _Names | str | None = None
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, PositiveFloat] | None = None
    ensure_weight_tying: bool = False


def read_config(folder: Path) -> PeftConfig:
    """What adapter_config.json says.

    Raises UserError, naming the key and the way out, for what is broken or not expressible here.
    """
    file = folder / CONFIG
    found = storage.read_json(file)

    def refused(key: str, remedy: str) -> UserError:
        return UserError(
            f"{file}: {key} is {shortened(found.get(key))}, which cannot be read: {remedy}"
        )

    if found.get("peft_type") != "LORA":
        raise refused("peft_type", f"only LORA can; if peft can merge the adapter, {MERGE}")
    init = str(found.get("init_lora_weights", True))
    if init not in _SOUND_INITS:
        convertible = init.startswith(_CONVERTIBLE)
        raise refused("init_lora_weights", _CONVERT if convertible else MERGE)
    for key, neutral in _NEUTRAL.items():
        if key in found and found[key] not in neutral:
            raise refused(key, _REMEDIES.get(key, MERGE))
    given = {key: value for key, value in found.items() if value is not None}
    try:
        # JSON mode: strict about types, and lists still become tuples.
        config = pydantic.TypeAdapter(PeftConfig).validate_json(json.dumps(given), strict=True)
    except pydantic.ValidationError as e:
        first = e.errors()[0]
        key = str(first["loc"][0])
        said = f"{key} is {shortened(found.get(key))}: {storage.one_line(first['msg'])}"
        raise UserError(f"{file}: {said}") from None
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise refused("layers_to_transform", "peft has it only beside a list of target_modules")
    known = {field.name for field in dataclasses.fields(PeftConfig)} | _NEUTRAL.keys() | _SILENT
    if unknown := sorted(key for key, value in given.items() if key not in known and value):
        say(f"note: {file}: unknown to this reader, and left alone: {', '.join(unknown)}")
    return config


def shortened(value: Any) -> str:
    """A value of the file, for an error."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def write_config(
    lora: LoraConfig,
    base: str,
    *,
    targets: Sequence[str],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    saved: Sequence[str],
    tied: bool,
) -> dict[str, Any]:
    """What adapter_config.json says: the names of modules, and ranks and alphas by name."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _plain(lora.alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(targets) or NO_TARGETS,
        "rank_pattern": dict(ranks),
        "alpha_pattern": {name: _plain(alpha) for name, alpha in alphas.items()},
        "modules_to_save": list(saved) or None,
        "ensure_weight_tying": tied,
    }


def _plain(alpha: float) -> float:
    return int(alpha) if alpha.is_integer() else alpha
