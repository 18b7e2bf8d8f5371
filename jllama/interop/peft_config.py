"""PEFT's adapter_config.json: which modules of a LLaMA an adapter has, of which rank and alpha.

Names, patterns and defaults are matched as peft 0.21.2 matches them.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pydantic

from jllama import storage
from jllama.config import (
    Beta,
    ComputeConfig,
    Count,
    LoraConfig,
    ModelConfig,
    PositiveFloat,
    PositiveInt,
)
from jllama.errors import UserError
from jllama.interop.names import NAMES, file_shape
from jllama.interop.parameters import check_named
from jllama.model.llama import ParamSpec, param_specs
from jllama.model.param import dotted
from jllama.progress import say

CONFIG = "adapter_config.json"
MERGE = "merge it into its base with peft (merge_and_unload), and convert the merged model"
_CONVERT = (
    "its factors belong to a base that was changed when it began; save it with peft's"
    " path_initial_model_for_weight_conversion, or " + MERGE
)
_NONE = "dummy-target-modules"  # peft's name for an adapter that has no low-rank part
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
    """What decides the function; defaults are peft's."""

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


class Module(NamedTuple):
    """A module of Hugging Face's LLaMA that has one parameter.

    Attributes:
      name: there, as model.layers.0.self_attn.q_proj.
      path: here, of the parameter in all layers.
      layer: which of the parameter's, or None.
      spec: of one layer.
    """

    name: str
    path: str
    layer: int | None
    spec: ParamSpec

    @property
    def owner(self) -> str:
        """The path here without the parameter's own word: layers.attention.q."""
        return self.path.rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter there."""
        return file_shape(self.spec.shape, self.spec.inputs)

    @property
    def is_table(self) -> bool:
        """The embedding or the head."""
        return self.path.endswith(".weight")

    @property
    def is_embedding(self) -> bool:
        return self.owner == "embedding"

    @property
    def matrix(self) -> tuple[int, int]:
        """(outputs, inputs) of the module; an embedding's file has them the other way round."""
        outputs, inputs = self.shape
        return (inputs, outputs) if self.is_embedding else (outputs, inputs)

    @property
    def factors(self) -> tuple[str, str]:
        """What a file calls A [R,inputs] and B [outputs,R]."""
        if self.is_embedding:
            return "lora_embedding_A", "lora_embedding_B"
        return "lora_A.weight", "lora_B.weight"

    def tensor(self, name: str) -> str:
        """The name in a file of one of the module's tensors."""
        return f"base_model.model.{self.name}.{name}"


class Plan(NamedTuple):
    """What an adapter has: the rank and alpha of each low-rank module, and what is whole."""

    low: dict[Module, tuple[int, float]]
    whole: list[Module]


def modules(model: ModelConfig) -> list[Module]:
    """Those of the model, in its order; a tied head is one of them.

    Raises UserError for a model that other formats cannot express.
    """
    specs = param_specs(model, ComputeConfig(dtype="float32"))
    check_named(specs)
    flat = {dotted(path): spec for path, spec in jax.tree.leaves_with_path(specs)}
    if model.tie_embeddings:
        flat["head.weight"] = flat["embedding.weight"]
    found = []
    for name in NAMES:
        if name.path not in flat:
            continue
        spec = flat[name.path]
        one = dataclasses.replace(spec, shape=spec.shape[1:]) if name.stacked else spec
        for layer in range(spec.shape[0]) if name.stacked else [None]:
            there = name.of("hf", layer or 0).removesuffix(".weight")
            found.append(Module(there, name.path, layer, one))
    return found


def read_config(folder: Path) -> PeftConfig:
    """What adapter_config.json says.

    Raises UserError, naming the key and the way out, for what is broken or not expressible here.
    """
    file = folder / CONFIG
    found = storage.read_json(file)

    def refused(key: str, remedy: str) -> UserError:
        return UserError(
            f"{file}: {key} is {_short(found.get(key))}, which cannot be read: {remedy}"
        )

    if found.get("peft_type") != "LORA":
        raise refused("peft_type", f"only LORA can; if peft can merge the adapter, {MERGE}")
    init = found.get("init_lora_weights", True)
    if str(init) not in _SOUND_INITS:
        raise refused("init_lora_weights", _CONVERT)
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
        said = f"{key} is {_short(found.get(key))}: {storage.one_line(first['msg'])}"
        raise UserError(f"{file}: {said}") from None
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        raise refused("layers_to_transform", "peft has it only beside a list of target_modules")
    known = {field.name for field in dataclasses.fields(PeftConfig)} | _NEUTRAL.keys() | _SILENT
    if unknown := sorted(key for key, value in given.items() if key not in known and value):
        say(f"note: {file}: unknown to this reader, and left alone: {', '.join(unknown)}")
    return config


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def plan(config: PeftConfig, model: ModelConfig, where: Path) -> Plan:
    """Which modules the adapter has, as peft finds them.

    Raises UserError for a pattern that is no regular expression, for a target that is no matrix or
    is to be saved whole, and for an adapter that has nothing of this model.
    """
    low: dict[Module, tuple[int, float]] = {}
    whole: list[Module] = []
    try:
        for module in modules(model):
            saved = _saved(config, module.name)
            if _targeted(config, module.name):
                if saved:
                    raise UserError(
                        f"{where}: {module.name} is in target_modules and in modules_to_save;"
                        " take it out of one"
                    )
                if not (module.spec.inputs or module.is_table):
                    raise UserError(
                        f"{where}: target_modules has {module.name}, which is no matrix; take it"
                        " out, or name it in modules_to_save"
                    )
                low[module] = (
                    _by_pattern(config.rank_pattern, module.name, config.r),
                    _by_pattern(config.alpha_pattern, module.name, config.lora_alpha),
                )
            elif saved:
                whole.append(module)
    except re.error as e:
        raise UserError(f"{where}: {e.pattern!r} is no regular expression: {e}") from None
    if not low and not whole:
        raise UserError(
            f"{where}: target_modules {_short(config.target_modules)} and modules_to_save"
            f" {_short(config.modules_to_save)} name nothing of this model, a LLaMA of"
            f" {model.num_layers} layers"
        )
    return Plan(low, whole)


def _targeted(config: PeftConfig, name: str) -> bool:
    """As `check_target_module_exists` of peft's tuners_utils."""
    excluded, targets = config.exclude_modules, config.target_modules
    if isinstance(excluded, str):
        if excluded and re.fullmatch(excluded, name):
            return False
    elif _is_or_ends(name, excluded or ()):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.modules_to_save or ()):
        return False
    if targets is None:  # as peft has it for LLaMA
        targets = ("q_proj", "v_proj")
    if isinstance(targets, str):
        if targets == _NONE:
            return False
        if targets.lower() == "all-linear":
            return name.endswith("_proj")
        return bool(re.fullmatch(targets, name))
    if not _is_or_ends(name, targets):
        return False
    chosen = config.layers_to_transform
    if name in targets or chosen is None or chosen == ():
        return True
    patterns = config.layers_pattern or (r"[^.]*",)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", name):
            layer = int(found["layer"])
            return layer == chosen if isinstance(chosen, int) else layer in chosen
    return False


def _is_or_ends(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _saved(config: PeftConfig, name: str) -> bool:
    """Whether the module, or one that it is in, is saved whole: peft looks at the ends of names."""
    parts = name.split(".")
    around = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(part.endswith(key) for part in around for key in config.modules_to_save or ())


def _by_pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """As `get_pattern_key` of peft's utils: the first that matches the end of the name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def write_config(lora: LoraConfig, found: Plan, model: ModelConfig, base: str) -> dict[str, Any]:
    """What adapter_config.json says of an adapter that has `found`."""
    targets: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    owners: dict[str, list[Module]] = {}
    for module in found.low:
        owners.setdefault(module.owner, []).append(module)
    for some in owners.values():
        everywhere = len(some) == model.num_layers
        alike = everywhere and len({found.low[module] for module in some}) == 1
        targets += [_short_name(some[0])] if everywhere else [module.name for module in some]
        for module in some[:1] if alike else some:
            rank, alpha = found.low[module]
            key = _short_name(module) if alike else module.name
            if rank != lora.rank:
                ranks[key] = rank
            if alpha != lora.alpha:
                alphas[key] = _plain(alpha)
    saved = list(dict.fromkeys(map(_short_name, found.whole)))
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
        "target_modules": targets or _NONE,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": saved or None,
        "ensure_weight_tying": model.tie_embeddings and "embed_tokens" in saved,
    }


def _short_name(module: Module) -> str:
    """The end of the name that all layers share, and no other module."""
    # peft looks at the ends of names, and "norm" ends three of them.
    parts = 2 if module.owner == "final_norm" else 1
    return ".".join(module.name.split(".")[-parts:])


def _plain(alpha: float) -> float:
    return int(alpha) if alpha.is_integer() else alpha
