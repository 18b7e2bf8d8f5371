"""Reads PEFT adapters: adapter_config.json and the tensors beside it.

A low-rank change of a block's matrix is read as a factor pair of an overlay. An overlay cannot hold
a low-rank embedding or head, nor a module that is whole in some layers only: these are worked out
into whole parameters, for which the base is needed.

V vocabulary, D model width.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jllama.adapt.lora import Overlay, matrices, overlay_specs, whole_leaves
from jllama.config import ComputeConfig, LoraConfig, LoraOverride, ModelConfig
from jllama.errors import UserError
from jllama.files import storage
from jllama.interop.parameters import check_tensors
from jllama.interop.peft_config import MERGE, WEIGHTS, PeftConfig, read_config
from jllama.interop.peft_modules import (
    BASE,
    NORMS,
    LowRank,
    Module,
    Use,
    adapted,
    by_owner,
)
from jllama.interop.pth import read_pth
from jllama.interop.safetensors import read_safetensors
from jllama.interop.tensors import Tensor, from_file, nbytes
from jllama.model.linear import dense
from jllama.model.llama import Params, ParamSpec
from jllama.progress import Progress, say

_READERS = {WEIGHTS: read_safetensors, "adapter_model.bin": read_pth}
# The name of the adapter in the keys of a state dict, which peft's save_pretrained takes out; its
# from_pretrained reads these keys too, if the name is "default".
_NAMED = re.compile(
    r"((?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\b)\.default\b"
    r"|modules_to_save\.default\."
)
_EXACT = ComputeConfig(dtype="float32")


def read_adapter(
    folder: Path, model: ModelConfig, base: Params | None = None
) -> tuple[LoraConfig, Overlay]:
    """Reads an adapter as an overlay of the model: float32 arrays on the host.

    Args:
      base: the parameters that it adapts. Needed to work out whole parameters, and for a DoRA that
        has some layers only.

    Raises UserError for what is missing, broken or not expressible here; it lists every missing,
    extra and misshapen tensor by its name in the file and our path.
    """
    adapter = _open(folder, model)
    specs = overlay_specs(model, _EXACT, adapter.lora)
    owners = by_owner(adapter.uses)
    overlay: Overlay = {}  # by dotted path
    with Progress(f"read {folder.name}", sum(map(nbytes, adapter.tensors.values()))) as progress:
        reader = _Reader(adapter, base, progress)
        for path, spec in matrices(specs).items():
            overlay[path] = reader.factors(spec, owners[path])
        for path, spec in whole_leaves(specs).items():
            overlay[path] = reader.whole(spec, owners[path.rpartition(".")[0]])
    if reader.worked_out:
        say(f"note: {folder}: worked out with the base: {', '.join(reader.worked_out)}")
    return adapter.lora, unflatten_dict(overlay, sep=".")


def read_lora(folder: Path, model: ModelConfig) -> LoraConfig:
    """The config of an adapter's overlay; reads no values. Raises as `read_adapter` does."""
    return _open(folder, model).lora


@dataclasses.dataclass(frozen=True)
class _Adapter:
    """An adapter whose tensors were checked; `lora` is the config of its overlay."""

    folder: Path
    config: PeftConfig
    uses: Mapping[Module, Use]
    tensors: Mapping[str, Tensor]
    lora: LoraConfig


def _open(folder: Path, model: ModelConfig) -> _Adapter:
    config = read_config(folder)
    uses, tensors = adapted(config, model, _tensors(folder), folder)
    _check(uses, config, model, tensors, folder)
    low, whole = {}, []
    for owner, used in by_owner(uses).items():
        if used[0].is_table or uses[used[0]] == "whole":
            whole.append(owner)
        else:
            low[owner] = used
    lora = LoraConfig(
        kind="lora",
        rank=config.r,
        alpha=config.lora_alpha,
        rslora=config.use_rslora,
        dora=config.use_dora,
        dropout=config.lora_dropout,
        targets=tuple(map(_word, low)),
        full=tuple(map(_word, whole)),
        overrides=tuple(_overrides(low, uses, config, model.num_layers)),
    )
    return _Adapter(folder, config, uses, tensors, lora)


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    names = storage.listing(folder).files
    for name, read in _READERS.items():
        if name in names:
            tensors = read(folder / name)
            return {_NAMED.sub(r"\1", name): tensor for name, tensor in tensors.items()}
    raise UserError(f"{folder}: no weights: expected {' or '.join(_READERS)}")


def _check(
    uses: Mapping[Module, Use],
    config: PeftConfig,
    model: ModelConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Raises UserError for tensors that do not fit, and for what no overlay can express."""
    V = model.vocab_size
    wanted = _wanted(uses, config, tensors)
    for name, tensor in tensors.items():
        if 0 in tensor.shape:
            raise UserError(
                f"{folder}: {name} is empty: DeepSpeed's ZeRO-3 or FSDP saved parameters that were"
                " not gathered; save the adapter again"
            )
        path, shape = wanted.get(name, ("", ()))
        rows = [n for n, want in zip(tensor.shape, shape, strict=False) if want == V < n]
        if rows and path.partition(".")[0] in ("embedding", "head"):
            raise UserError(
                f"{folder}: {name} has {rows[0]:,} tokens, and the model has {V:,}: its vocabulary"
                " was grown first; grow the model's to as many (jllama vocabulary grow; a tokenizer"
                " with fewer ids gets more by the --special of jllama vocabulary merge), and load"
                " the adapter with that model"
            )
    check_tensors(tensors, wanted, folder, "this adapter's")
    for used in by_owner(uses).values():
        kinds = {uses[module] == "whole": module for module in reversed(used)}
        if len(kinds) > 1:
            raise UserError(
                f"{folder}: {kinds[False].name} is low-rank and {kinds[True].name} saved whole,"
                f" which one overlay cannot be; {MERGE}"
            )
    for module, use in uses.items():
        if use != "whole" and not module.is_table and use.rank > min(module.shape):
            raise UserError(
                f"{folder}: {module.name} has rank {use.rank}, above the {min(module.shape)} that"
                f" its matrix can have; {MERGE}"
            )


def _wanted(
    uses: Mapping[Module, Use], config: PeftConfig, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our path and the file's shape of every tensor that the adapter must have, by its name."""
    wanted = {}
    for module, use in uses.items():
        if use == "whole":
            wanted[module.tensor("weight")] = module.path, module.shape
            continue
        outputs, inputs = module.matrix
        a, b = map(module.tensor, module.factors)
        wanted[a] = f"{module.owner}.a", (use.rank, inputs)
        wanted[b] = f"{module.owner}.b", (outputs, use.rank)
        if config.use_dora:
            wanted[module.tensor(NORMS)] = f"{module.owner}.m", (outputs,)
        if module.is_table and module.tensor(BASE) in tensors:
            wanted[module.tensor(BASE)] = module.path, module.shape
    return wanted


def _overrides(
    low: Mapping[str, Sequence[Module]],
    uses: Mapping[Module, Use],
    config: PeftConfig,
    num_layers: int,
) -> Iterator[LoraOverride]:
    """The ranks and alphas that differ from the config's r and lora_alpha."""
    usual = LowRank(config.r, config.lora_alpha)
    for owner, used in low.items():
        rank, alpha = uses[used[0]]
        # A layer that the adapter leaves out gets rank 0. DoRA's norms are in every layer, so there
        # it gets the rank of another layer, with factors of zeros.
        absent = LowRank(rank if config.use_dora else 0, alpha)
        by_layer = dict.fromkeys(range(num_layers), absent)
        by_layer |= {module.layer: uses[module] for module in used}
        for use in dict.fromkeys(by_layer.values()):
            if use != usual:
                layers = tuple(n for n, other in by_layer.items() if other == use)
                yield LoraOverride(
                    match=_word(owner),
                    layers=None if len(layers) == num_layers else layers,
                    rank=None if use.rank == usual.rank else use.rank,
                    alpha=None if use.alpha == usual.alpha else use.alpha,
                )


@dataclasses.dataclass
class _Reader:
    """Reads the leaves of an overlay from an adapter's tensors."""

    adapter: _Adapter
    base: Params | None
    progress: Progress
    worked_out: list[str] = dataclasses.field(default_factory=list)

    def factors(self, specs: Overlay, used: Sequence[Module]) -> Overlay:
        """The factors of one matrix: zero in layers without any, and beyond a layer's rank."""
        leaf = {key: np.zeros(spec.shape, np.float32) for key, spec in specs.items()}
        if "m" in leaf and len(used) < len(leaf["m"]):
            # With the norms of the base's columns, a layer without factors computes x W.
            kernel = self._base_parameter(used[0])
            inputs = tuple(range(1, 1 + specs["a"].inputs))
            leaf["m"][:] = np.sqrt(np.sum(np.square(kernel), axis=inputs))
        for module in used:
            n, rank = module.layer, self.adapter.uses[module].rank
            a, b = (self._read(module, name) for name in module.factors)
            for part, array, inputs in (
                (leaf["a"][n, ..., :rank], a, specs["a"].inputs),
                (leaf["b"][n, :rank], b, specs["b"].inputs),
            ):
                part[...] = from_file(array, part.shape, inputs, interleaved=False)
            if "m" in leaf:
                leaf["m"][n] = self._read(module, NORMS).reshape(leaf["m"].shape[1:])
        return leaf

    def whole(self, spec: ParamSpec, used: Sequence[Module]) -> np.ndarray:
        """A whole parameter in all layers; the padding of a table is zeros."""
        first = used[0]
        rows = first.spec.shape[0]
        is_low = self.adapter.uses[first] != "whole"
        is_partial = first.layer is not None and len(used) < spec.shape[0]
        if is_partial or is_low:
            self.worked_out.append(first.owner)
        out = self._base_parameter(first) if is_partial else np.zeros(spec.shape, np.float32)
        if is_low:
            out[:rows] = self._table(first)
            return out
        for module in used:
            target = out[:rows] if module.layer is None else out[module.layer]
            array = self._read(module, "weight")
            target[...] = from_file(array, target.shape, module.spec.inputs, interleaved=False)
        return out

    def _table(self, module: Module) -> np.ndarray:
        """A low-rank embedding or head as a whole table [V,D]."""
        if module.tensor(BASE) in self.adapter.tensors:
            w = self._read(module, BASE)
        else:
            w = self._base_parameter(module)[: module.shape[0]]
        a, b = (self._read(module, name) for name in module.factors)
        rank, alpha = self.adapter.uses[module]
        change = alpha / (rank**0.5 if self.adapter.config.use_rslora else rank) * (b @ a)
        w = w.T + change if module.is_embedding else w + change
        if self.adapter.config.use_dora:
            w *= (self._read(module, NORMS) / np.linalg.norm(w, axis=1))[:, None]
        return np.ascontiguousarray(w.T) if module.is_embedding else w

    def _base_parameter(self, module: Module) -> np.ndarray:
        """A new float32 array of the base's parameter in all layers."""
        if self.base is None:
            raise UserError(
                f"{self.adapter.folder}: {module.name} is worked out with the base's {module.path},"
                " which was not given; load the adapter together with its base"
            )
        return np.array(dense(flatten_dict(self.base, sep=".")[module.path], np.float32))

    def _read(self, module: Module, name: str) -> np.ndarray:
        array = self.adapter.tensors[module.tensor(name)].read()
        self.progress.advance(array.nbytes)
        return array.astype(np.float32, copy=False)


def _word(owner: str) -> str:
    """The pattern that names the parameter in a `LoraConfig`."""
    return owner.rpartition(".")[2]
