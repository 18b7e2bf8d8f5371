"""PEFT's adapter_config.json, read and written; defaults are those of peft 0.21.2."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jllama.config import Beta, Count, LoraConfig
from jllama.errors import UserError
from jllama.files import storage
from jllama.interop.json_config import Positive, Size, check, check_neutral, json_dataclass
from jllama.interop.names import PEFT_CONFIG
from jllama.progress import note

CONFIG = PEFT_CONFIG
WEIGHTS = "adapter_model.safetensors"
MERGE = "merge it into its base with peft (merge_and_unload), and convert the merged model"
# Initialisations that change the base. peft can convert such an adapter to one of the old base. It
# changes the base again when it opens the first two; the others take random numbers or data, so
# that their base is gone with the process that trained.
_REPEATED, _LOST = ("pissa", "olora"), ("pissa_niter", "corda", "lora_ga")
_CHANGED = "the factors belong to a base that the initialisation changed"
_CONVERT = "save the adapter with peft's path_initial_model_for_weight_conversion, or "
NO_TARGETS = "dummy-target-modules"  # peft's name for an adapter that has no low-rank part
# Keys that change the function as an overlay cannot, with the values at which they do not.
_NEUTRAL: dict[str, tuple] = {
    "peft_type": ("LORA",),
    # Initialisations that leave the base as it was.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
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
}
_REMEDIES = {
    "peft_type": "only LORA can be read; if peft can merge the adapter, " + MERGE,
    "bias": 'LLaMA has no biases; if the file has no tensor named bias, write "none"',
    "lora_bias": "peft cannot merge biases into LLaMA, which has none; train without lora_bias",
    "fan_in_fan_out": "LLaMA's matrices are [outputs, inputs]; if the file's are, write false",
    "task_type": "only CAUSAL_LM has the head of a language model",
    "alora_invocation_tokens": "an adapter that begins at some token cannot be expressed",
    "arrow_config": "a router among adapters cannot be expressed",
    # peft adds the changes of all copies to the one matrix that they share when it merges.
    "layer_replication": (
        "in a copy of it write null, and read that over a base whose layers are so repeated"
        " (docs/interop.md)"
    ),
    # It pools the inputs of GPTQ's matrices, and does nothing to others.
    "use_qalora": (
        "if the file's lora_A are as wide as their matrices, write false; else it is over GPTQ's,"
        " which cannot be read"
    ),
}
# Keys that do not change the function. layers_pattern finds the layer's number in names, of which
# LLaMA's have only one; megatron_config is of Megatron's own layers, which have other names.
_SILENT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "layers_pattern", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "velora_config",
}  # fmt: skip

_Names = tuple[str, ...]


@json_dataclass
class PeftConfig:
    """The keys of adapter_config.json that decide the function."""

    r: Size = 8
    lora_alpha: Positive = 8.0
    lora_dropout: Beta = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: _Names | str | None = None
    exclude_modules: _Names | str | None = None
    modules_to_save: _Names | None = None
    layers_to_transform: tuple[Count, ...] | Count | None = None
    rank_pattern: dict[str, Size] | None = None
    alpha_pattern: dict[str, Positive] | None = None
    ensure_weight_tying: bool = False


def read_config(folder: Path) -> PeftConfig:
    """Reads adapter_config.json.

    Raises UserError, which names the key and the way out, for what is broken or not expressible.
    """
    file = folder / CONFIG
    values = storage.read_json(file)
    kind, remedies = values.get("init_lora_weights"), dict(_REMEDIES)
    if kind in _REPEATED:
        remedies["init_lora_weights"] = f"{_CHANGED}; {_CONVERT}{MERGE}"
    elif str(kind).startswith(_LOST):
        remedies["init_lora_weights"] = f"{_CHANGED}; where it was trained, {_CONVERT}{MERGE}"
    check_neutral({"peft_type": None} | values, file, _NEUTRAL, remedies, MERGE)
    given = {key: value for key, value in values.items() if value is not None}
    config = check(PeftConfig, given, file)
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise UserError(
            f"{file}: layers_to_transform is given, and target_modules is a text; peft allows it"
            " beside a list only"
        )
    known = {field.name for field in dataclasses.fields(PeftConfig)} | _NEUTRAL.keys() | _SILENT
    if unknown := sorted(key for key, value in given.items() if key not in known and value):
        note(f"{file}: unknown to this reader, and left alone: {', '.join(unknown)}")
    return config


def write_config(lora: LoraConfig, base: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of adapter_config.json; `base` is the base's folder or name.

    `named` are those that name modules.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": plain(lora.alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        **named,
    }


def plain(alpha: float) -> float:
    """The number as an integer if it is one."""
    return int(alpha) if alpha.is_integer() else alpha
