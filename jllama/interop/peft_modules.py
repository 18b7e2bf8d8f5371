"""The modules of Hugging Face's LLaMA, and which of them a PEFT adapter adapts.

The rules by which names match are those of peft 0.21.2. R is a rank.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from jllama.config import ModelConfig
from jllama.errors import UserError
from jllama.interop.json_config import shortened
from jllama.interop.names import file_shape
from jllama.interop.parameters import file_specs, layers_of
from jllama.interop.peft_config import NO_TARGETS, PeftConfig
from jllama.interop.tensors import DTYPES, Tensor, same_values
from jllama.model.llama import ParamSpec

NORMS = "lora_magnitude_vector"  # of DoRA
BASE = "base_layer.weight"  # peft saves a low-rank table's base beside its factors
T = TypeVar("T")


class Module(NamedTuple):
    """A module of Hugging Face's LLaMA that has one parameter.

    Attributes:
      name: Hugging Face's, as model.layers.0.self_attn.q_proj.
      path: our dotted path of the parameter, which has all layers stacked.
      layer: the layer's number; None for a parameter that is not stacked.
      spec: of one layer; of a table without its padding.
    """

    name: str
    path: str
    layer: int | None
    spec: ParamSpec

    @property
    def owner(self) -> str:
        """The path without its last word: layers.attention.q. All layers share it."""
        return self.path.rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter in Hugging Face's files."""
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
        """(outputs, inputs) of the module; an embedding's parameter is [inputs, outputs]."""
        outputs, inputs = self.shape
        return (inputs, outputs) if self.is_embedding else (outputs, inputs)

    @property
    def factors(self) -> tuple[str, str]:
        """The names in a file of A [R,inputs] and B [outputs,R]."""
        if self.is_embedding:
            return "lora_embedding_A", "lora_embedding_B"
        return "lora_A.weight", "lora_B.weight"

    @property
    def short(self) -> str:
        """The end of the name that all layers share, and no other module has."""
        # "norm" alone ends the names of three modules.
        parts = 2 if self.owner == "final_norm" else 1
        return ".".join(self.name.split(".")[-parts:])

    def tensor(self, name: str) -> str:
        """The name in a file of one of the module's tensors."""
        return f"base_model.model.{self.name}.{name}"


class LowRank(NamedTuple):
    """A low-rank change of a module: alpha / rank times B A, or alpha / sqrt(rank) with rsLoRA."""

    rank: int
    alpha: float


Use = LowRank | Literal["whole"]  # how an adapter changes a module; "whole" replaces its parameter


def modules(model: ModelConfig) -> list[Module]:
    """All modules of the model, in its order, a tied head among them.

    Raises UserError for a model that other formats cannot express.
    """
    specs = file_specs(model)
    if model.tie_embeddings:
        specs = {**specs, "head": specs["embedding"]}
    return [
        Module(name.of("hf", layer or 0).removesuffix(".weight"), name.path, layer, spec)
        for name, layer, spec in layers_of(specs)
    ]


def adapted(
    config: PeftConfig, model: ModelConfig, tensors: Mapping[str, Tensor], where: Path
) -> tuple[dict[Module, Use], Mapping[str, Tensor]]:
    """The modules that an adapter changes, and its tensors without those of a tied head.

    These are the modules that adapter_config.json names, and an embedding or head whose weight is
    in the file though no key names it: peft saves a resized one like that.

    Raises UserError for a pattern that is no regular expression, a target that is no matrix, a tied
    head that changes otherwise than the embedding, and an adapter that has nothing of this model.
    """
    all_modules = modules(model)
    try:
        uses = {m: use for m in all_modules if (use := _use(config, m))}
    except re.error as e:
        raise UserError(f"{where}: {e.pattern!r} is no regular expression: {e}") from None
    if not uses:
        raise UserError(
            f"{where}: target_modules {shortened(config.target_modules)} and modules_to_save"
            f" {shortened(config.modules_to_save)} name nothing of this model"
        )
    for module, use in uses.items():
        if use != "whole" and not (module.spec.inputs or module.is_table):
            raise UserError(
                f"{where}: target_modules has {module.name}, which is no matrix; take it out, or"
                " name it in modules_to_save"
            )
    tables = {module.owner: module for module in all_modules if module.is_table}
    if model.tie_embeddings:
        tensors = _untie(uses, tables["embedding"], tables["head"], config, tensors, where)
    for module in tables.values():
        if module.tensor("weight") in tensors:
            uses.setdefault(module, "whole")
    return uses, tensors


def _use(config: PeftConfig, module: Module) -> Use | None:
    # peft looks at the ends of the names of the module and of those that it is part of.
    if any(f"{end}." in f"{module.name}." for end in config.modules_to_save or ()):
        return "whole"
    if not _is_target(config, module):
        return None
    return LowRank(
        _by_pattern(config.rank_pattern, module.name, config.r),
        _by_pattern(config.alpha_pattern, module.name, config.lora_alpha),
    )


def _is_target(config: PeftConfig, module: Module) -> bool:
    targets = config.target_modules
    if targets is None:
        targets = ("q_proj", "v_proj")  # peft's default for LLaMA
    elif targets == NO_TARGETS:
        return False
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        targets = r".*_proj"
    if not _matches(targets, module.name) or _matches(config.exclude_modules or (), module.name):
        return False
    layers = config.layers_to_transform
    layers = (layers,) if isinstance(layers, int) else layers
    return not layers or module.layer in layers or module.name in targets


def _matches(patterns: str | Sequence[str], name: str) -> bool:
    """Whether a regular expression fits the name, or one of several names is the end of it."""
    if isinstance(patterns, str):
        return bool(re.fullmatch(patterns, name))
    return any(f".{name}".endswith(f".{end}") for end in patterns)


def _by_pattern(patterns: Mapping[str, T] | None, name: str, default: T) -> T:
    """The value of the first regular expression that fits the end of the name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _untie(
    uses: dict[Module, Use],
    embedding: Module,
    head: Module,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    where: Path,
) -> dict[str, Tensor]:
    """Removes the head from `uses`, and returns the tensors without the head's.

    Raises UserError if the adapter changes the head otherwise than the embedding.
    """
    if config.ensure_weight_tying:  # peft changes both as it changes one
        for one, other in ((embedding, head), (head, embedding)):
            if other in uses:
                uses.setdefault(one, uses[other])
    use, heads_use = uses.get(embedding), uses.pop(head, None)
    if (
        use != heads_use
        # The norms are those of D columns for the embedding, and of V rows for the head.
        or (config.use_dora and isinstance(use, LowRank))
        or not _equal(embedding, head, tensors)
    ):
        raise UserError(
            f"{where}: changes the embedding and the head differently, and the model ties them;"
            " give it as its base a copy with two tables: jllama convert BASE UNTIED --untie"
        )
    return {n: tensor for n, tensor in tensors.items() if not n.startswith(head.tensor(""))}


def _equal(embedding: Module, head: Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head's tensors equal the embedding's, where the file has both.

    The factors of the embedding are those of the head transposed, and in the other order.
    """
    for name in ("weight", BASE):
        a, b = tensors.get(embedding.tensor(name)), tensors.get(head.tensor(name))
        if a and b and not same_values(a, b):
            return False
    for name, other in zip(embedding.factors, head.factors[::-1], strict=True):
        a, b = tensors.get(embedding.tensor(name)), tensors.get(head.tensor(other))
        if a and b and not ({a.dtype, b.dtype} <= DTYPES and np.array_equal(a.read(), b.read().T)):
            return False
    return True


def by_owner(all_modules: Iterable[Module]) -> dict[str, list[Module]]:
    """The modules by our path without its last word, which all layers share."""
    owners: dict[str, list[Module]] = {}
    for module in all_modules:
        owners.setdefault(module.owner, []).append(module)
    return owners
