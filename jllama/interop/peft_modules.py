"""Which modules of a LLaMA a PEFT adapter has, and how: as peft 0.21.2 finds them.

V vocabulary, D model width, R rank.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jllama.config import ModelConfig
from jllama.errors import UserError
from jllama.interop.json_config import shortened
from jllama.interop.names import NAMES, file_shape
from jllama.interop.parameters import check_named, file_specs
from jllama.interop.peft_config import NO_TARGETS, PeftConfig
from jllama.interop.tensors import DTYPES, Tensor, same_bits
from jllama.model.llama import ParamSpec
from jllama.model.param import dotted

BASE = "base_layer.weight"  # of a low-rank table, which peft saves beside its factors


class Module(NamedTuple):
    """A module of Hugging Face's LLaMA that has one parameter.

    Attributes:
      name: there, as model.layers.0.self_attn.q_proj.
      path: here, of the parameter in all layers.
      layer: which of the parameter's, or None.
      spec: of one layer, a table without padding.
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

    @property
    def short(self) -> str:
        """The end of the name that all layers share, and no other module."""
        # peft looks at the ends of names, and "norm" ends three of them.
        parts = 2 if self.owner == "final_norm" else 1
        return ".".join(self.name.split(".")[-parts:])

    def tensor(self, name: str) -> str:
        """The name in a file of one of the module's tensors."""
        return f"base_model.model.{self.name}.{name}"


class Plan(NamedTuple):
    """What an adapter has: the rank and alpha of each low-rank module, and what is whole."""

    low: dict[Module, tuple[int, float]]
    whole: list[Module]

    @property
    def how(self) -> dict[Module, Any]:
        """(rank, alpha), or "whole", of each module."""
        return {**self.low, **dict.fromkeys(self.whole, "whole")}


def modules(model: ModelConfig) -> list[Module]:
    """Those of the model, in its order; a tied head is one of them.

    Raises UserError for a model that other formats cannot express.
    """
    specs = file_specs(model)
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


def plan(config: PeftConfig, there: Sequence[Module], where: Path) -> Plan:
    """Which modules the adapter has, as peft finds them.

    Raises UserError for a pattern that is no regular expression, for a target that is no matrix or
    is to be saved whole, and for an adapter that has nothing of this model.
    """
    low: dict[Module, tuple[int, float]] = {}
    whole: list[Module] = []
    try:
        for module in there:
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
            f"{where}: target_modules {shortened(config.target_modules)} and modules_to_save"
            f" {shortened(config.modules_to_save)} name nothing of this model"
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
        if targets == NO_TARGETS:
            return False
        if targets.lower() == "all-linear":
            return name.endswith("_proj")
        return bool(re.fullmatch(targets, name))
    if not _is_or_ends(name, targets):
        return False
    chosen = config.layers_to_transform
    if name in targets or chosen is None or chosen == ():
        return True
    for pattern in (r"[^.]*",):
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


def with_tables(found: Plan, there: Sequence[Module], tensors: Mapping[str, Tensor]) -> Plan:
    """With an embedding or head that is saved though no key names it, as a resized one is."""
    how = found.how
    tables = [module for module in there if module.is_table and module not in how]
    return Plan(found.low, [*found.whole, *(t for t in tables if t.tensor("weight") in tensors)])


def without_tied_head(
    found: Plan,
    config: PeftConfig,
    there: Sequence[Module],
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> tuple[Plan, dict[str, Tensor]]:
    """Takes out the head; UserError if it is not adapted as the embedding is."""
    tables = {module.owner: module for module in there if module.is_table}
    embedding, head = tables["embedding"], tables["head"]
    how = found.how
    if config.ensure_weight_tying:  # peft adapts both as it adapts one
        for one, other in ((embedding, head), (head, embedding)):
            if other in how:
                how.setdefault(one, how[other])
    kind, other = how.get(embedding), how.pop(head, None)
    mine = {name for name in tensors if name.startswith(head.tensor(""))}
    if (
        kind != other
        or (config.use_dora and kind not in (None, "whole"))  # of other norms, of D and of V
        or not _alike(embedding, head, tensors)
    ):
        raise UserError(
            f"{folder}: changes the embedding and the head differently, and the model ties them;"
            " train it with peft's ensure_weight_tying, or merge it with peft, save that model with"
            " tie_word_embeddings false, and convert it"
        )
    low = {module: kind for module, kind in how.items() if kind != "whole"}
    left = {name: tensor for name, tensor in tensors.items() if name not in mine}
    return Plan(low, [module for module, kind in how.items() if kind == "whole"]), left


def _alike(embedding: Module, head: Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head's tensors are the embedding's, or their transposes; or are not there."""
    copies = [("weight", "weight"), (BASE, BASE)]
    for one, other in [*copies, *zip(embedding.factors, head.factors[::-1], strict=True)]:
        a, b = tensors.get(embedding.tensor(one)), tensors.get(head.tensor(other))
        if a is None or b is None:
            continue
        if one == other:
            if not same_bits(a, b):
                return False
        elif not {a.dtype, b.dtype} <= DTYPES or not np.array_equal(a.read(), b.read().T):
            return False
    return True
