"""PEFT adapters: adapter_config.json and the factors beside it; read and written.

The low-rank part of a block's matrix is one of an overlay. What an overlay cannot hold so, a
low-rank embedding or head, or modules that are whole in some layers only, is worked out into the
whole parameter, for which the base is needed.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jllama.adapt.lora import (
    Overlay,
    matrices,
    overlay_specs,
    ranks_and_alphas,
    set_at,
    whole_leaves,
)
from jllama.config import ComputeConfig, LoraConfig, LoraOverride, ModelConfig
from jllama.errors import UserError
from jllama.files import outputs, storage
from jllama.interop.hf_tokenizer import tokenizer_files
from jllama.interop.names import from_file, to_file
from jllama.interop.parameters import check_tensors
from jllama.interop.peft_config import CONFIG, MERGE, PeftConfig, read_config, write_config
from jllama.interop.peft_modules import (
    BASE,
    Module,
    Plan,
    modules,
    plan,
    with_tables,
    without_tied_head,
)
from jllama.interop.pth import read_pth
from jllama.interop.safetensors import read_safetensors, write_safetensors
from jllama.interop.tensors import Tensor, nbytes
from jllama.model.linear import dense
from jllama.model.llama import Params, ParamSpec
from jllama.progress import Progress, say
from jllama.text.interface import Tokenizer

_WEIGHTS = "adapter_model.safetensors"
_READERS = {_WEIGHTS: read_safetensors, "adapter_model.bin": read_pth}
_EXACT = ComputeConfig(dtype="float32")
_NORMS = "lora_magnitude_vector"


# -------------------------------------------------------------------------------------------- read


def read_adapter(
    folder: Path, model: ModelConfig, base: Params | None = None
) -> tuple[LoraConfig, Overlay]:
    """An adapter as an overlay of the model: host arrays in float32.

    Args:
      base: the parameters that it adapts. Needed for what is worked out into whole parameters, and
        for a DoRA of some layers only.

    Raises UserError for what is missing, broken or not expressible here; every missing, extra and
    misshapen tensor is listed, by its name there and here.
    """
    here = _open(folder, model)
    specs = overlay_specs(model, _EXACT, here.lora)
    overlay: Overlay = {}
    with Progress(f"read {folder.name}", sum(map(nbytes, here.tensors.values()))) as progress:
        source = _Source(here.config, here.plan, here.tensors, base, folder, progress)
        for path, spec in matrices(specs):
            set_at(overlay, path, source.factors(spec, here.low[".".join(path)]))
        for path, spec in whole_leaves(specs):
            set_at(overlay, path, source.whole(spec, here.whole[".".join(path[:-1])]))
    if source.worked_out:
        say(f"note: {folder}: worked out with the base: {', '.join(source.worked_out)}")
    return here.lora, overlay


def read_lora(folder: Path, model: ModelConfig) -> LoraConfig:
    """What an adapter trains of the model, without its values. Raises as `read_adapter` does."""
    return _open(folder, model).lora


class _Opened(NamedTuple):
    """An adapter that was checked; `low` and `whole` are its modules by what they are here."""

    config: PeftConfig
    plan: Plan
    tensors: Mapping[str, Tensor]
    lora: LoraConfig
    low: dict[str, list[Module]]
    whole: dict[str, list[Module]]


def _open(folder: Path, model: ModelConfig) -> _Opened:
    config = read_config(folder)
    tensors = _tensors(folder)
    there = modules(model)
    found = plan(config, there, folder)
    if model.tie_embeddings:
        found, tensors = without_tied_head(found, config, there, tensors, folder)
    found = with_tables(found, there, tensors)
    _check(found, config, model, tensors, folder)
    how = found.how
    owners = _owners(module for module in there if module in how)
    low = {o: some for o, some in owners.items() if some[0] in found.low and not some[0].is_table}
    whole = {owner: some for owner, some in owners.items() if owner not in low}
    lora = LoraConfig(
        kind="lora",
        rank=config.r,
        alpha=config.lora_alpha,
        rslora=config.use_rslora,
        dora=config.use_dora,
        dropout=config.lora_dropout,
        targets=tuple(map(_word, low)),
        full=tuple(map(_word, whole)),
        overrides=tuple(_overrides(low, found, config, model.num_layers)),
    )
    return _Opened(config, found, tensors, lora, low, whole)


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    here = storage.names(folder)
    for name, read in _READERS.items():
        if name in here:
            return read(folder / name)
    raise UserError(f"{folder}: no weights: expected {' or '.join(_READERS)}")


def _check(
    found: Plan,
    config: PeftConfig,
    model: ModelConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """UserError for tensors that are not the adapter's, and for what no overlay can be."""
    V = model.vocab_size
    wanted = _wanted(found, config, tensors)
    for name, tensor in tensors.items():
        if 0 in tensor.shape:
            raise UserError(
                f"{folder}: {name} is empty: DeepSpeed's ZeRO-3 or FSDP saved parameters that were"
                " not gathered; save the adapter again"
            )
        path, want = wanted.get(name, ("", ()))
        is_table = path.partition(".")[0] in ("embedding", "head")
        grown = [n for n, m in zip(tensor.shape, want, strict=False) if m == V < n]
        if is_table and grown:
            raise UserError(
                f"{folder}: {name} is of {grown[0]:,} tokens, and the model has {V:,}: its"
                " vocabulary was grown first; grow the model's to as many (jllama vocabulary"
                " grow), and load the adapter with that"
            )
    check_tensors(tensors, wanted, folder, "this adapter's")
    for some in _owners(found.how).values():
        by_kind = {module in found.low: module for module in reversed(some)}
        if len(by_kind) > 1:
            raise UserError(
                f"{folder}: {by_kind[True].name} is low-rank and {by_kind[False].name} saved whole,"
                f" which one overlay cannot be; {MERGE}"
            )
    for module, (rank, _) in found.low.items():
        if not module.is_table and rank > min(module.shape):
            raise UserError(
                f"{folder}: {module.name} has rank {rank}, above the {min(module.shape)} that its"
                f" matrix can have; {MERGE}"
            )


def _wanted(
    found: Plan, config: PeftConfig, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The path here and the shape there of every tensor, by its name there."""
    wanted = {}
    for module, (rank, _) in found.low.items():
        outputs, inputs = module.matrix
        a, b = map(module.tensor, module.factors)
        wanted[a] = f"{module.owner}.a", (rank, inputs)
        wanted[b] = f"{module.owner}.b", (outputs, rank)
        if config.use_dora:
            wanted[module.tensor(_NORMS)] = f"{module.owner}.m", (outputs,)
        kept = module.tensor(BASE)  # of a table, beside its factors
        if module.is_table and kept in tensors:
            wanted[kept] = module.path, module.shape
    return wanted | {m.tensor("weight"): (m.path, m.shape) for m in found.whole}


def _owners(some: Iterable[Module]) -> dict[str, list[Module]]:
    """By what they are here, all layers of it together."""
    owners: dict[str, list[Module]] = {}
    for module in some:
        owners.setdefault(module.owner, []).append(module)
    return owners


def _overrides(
    low: Mapping[str, Sequence[Module]], found: Plan, config: PeftConfig, layers: int
) -> Iterator[LoraOverride]:
    for owner, some in low.items():
        rank, alpha = found.low[some[0]]
        # Where there is nothing the rank is 0; with norms, which all layers have, that of others.
        settings = dict.fromkeys(range(layers), (rank if config.use_dora else 0, alpha))
        settings |= {module.layer: found.low[module] for module in some}
        for rank, alpha in dict.fromkeys(settings.values()):
            if (rank, alpha) == (config.r, config.lora_alpha):
                continue
            chosen = [n for n, how in settings.items() if how == (rank, alpha)]
            yield LoraOverride(
                match=_word(owner),
                layers=None if len(chosen) == layers else tuple(chosen),
                rank=None if rank == config.r else rank,
                alpha=None if alpha == config.lora_alpha else alpha,
            )


@dataclasses.dataclass
class _Source:
    """The tensors of an adapter, as the leaves of an overlay."""

    config: PeftConfig
    found: Plan
    tensors: Mapping[str, Tensor]
    base: Params | None
    folder: Path
    progress: Progress
    worked_out: list[str] = dataclasses.field(default_factory=list)

    def factors(self, specs: Overlay, some: Sequence[Module]) -> Overlay:
        """Of one matrix in all layers; zero where there is none, and beyond a layer's rank."""
        leaf = {key: np.zeros(spec.shape, np.float32) for key, spec in specs.items()}
        if "m" in leaf and len(some) < len(leaf["m"]):
            # x W is m / |W| x W where nothing is added.
            kernel = self._of_base(some[0])
            inputs = tuple(range(1, 1 + specs["a"].inputs))
            leaf["m"][:] = np.sqrt(np.sum(np.square(kernel), axis=inputs))
        for module in some:
            n, rank = module.layer, self.found.low[module][0]
            a, b = (self._read(module, name) for name in module.factors)
            for part, file, inputs in (
                (leaf["a"][n, ..., :rank], a, specs["a"].inputs),
                (leaf["b"][n, :rank], b, specs["b"].inputs),
            ):
                part[...] = from_file(file, part.shape, inputs, interleaved=False)
            if "m" in leaf:
                leaf["m"][n] = self._read(module, _NORMS).reshape(leaf["m"].shape[1:])
        return leaf

    def whole(self, spec: ParamSpec, some: Sequence[Module]) -> np.ndarray:
        """Of one parameter in all layers; zero where a table is padded."""
        first = some[0]
        rows = first.spec.shape[0]
        partly = first.layer is not None and len(some) < spec.shape[0]
        if partly or first in self.found.low:
            self.worked_out.append(first.owner)
        out = self._of_base(first) if partly else np.zeros(spec.shape, np.float32)
        if first in self.found.low:
            out[:rows] = self._table(first)
            return out
        for module in some:
            target = out[:rows] if module.layer is None else out[module.layer]
            file = self._read(module, "weight")
            target[...] = from_file(file, target.shape, module.spec.inputs, interleaved=False)
        return out

    def _table(self, module: Module) -> np.ndarray:
        """A low-rank embedding or head worked out: [V,D]."""
        kept = module.tensor(BASE) in self.tensors
        w = self._read(module, BASE) if kept else self._of_base(module)[: module.shape[0]]
        a, b = (self._read(module, name) for name in module.factors)
        rank, alpha = self.found.low[module]
        scale = alpha / (rank**0.5 if self.config.use_rslora else rank)
        change = scale * (b @ a)
        w = w.T + change if module.is_embedding else w + change
        if self.config.use_dora:
            w *= (self._read(module, _NORMS) / np.linalg.norm(w, axis=1))[:, None]
        return np.ascontiguousarray(w.T) if module.is_embedding else w

    def _of_base(self, module: Module) -> np.ndarray:
        """The base's parameter in all layers: float32, an array of its own."""
        if self.base is None:
            raise UserError(
                f"{self.folder}: {module.name} is worked out with the base's {module.path}, which"
                " was not given; load the adapter together with its base"
            )
        leaf = self.base
        for key in module.path.split("."):
            leaf = leaf[key]
        return np.array(dense(leaf, np.float32))

    def _read(self, module: Module, name: str) -> np.ndarray:
        array = self.tensors[module.tensor(name)].read()
        self.progress.advance(array.nbytes)
        return array.astype(np.float32, copy=False)


# ------------------------------------------------------------------------------------------- write


def write_adapter(
    folder: Path,
    model: ModelConfig,
    lora: LoraConfig,
    overlay: Overlay,
    base: str,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes an adapter that peft's `PeftModel.from_pretrained` reads, whole or not at all.

    A layer whose factors are zero, and so can neither change anything nor learn, is left out.

    Args:
      overlay: arrays of any float dtype that files have; they are kept as they are.
      base: what the adapter adapts, a folder or a name, for `base_model_name_or_path`.
      tokenizer: written beside it, as Hugging Face has it.

    Raises UserError if the folder holds anything, or the model is one that Hugging Face's LLaMA
    cannot express.
    """
    owners = _owners(modules(model))
    low: dict[Module, tuple[int, float]] = {}
    whole: list[Module] = []
    tensors: dict[str, Tensor] = {}

    def put(module: Module, name: str, array: np.ndarray, inputs: int) -> None:
        tensors[module.tensor(name)] = _Held(to_file(array, inputs, interleaved=False))

    for path, factors in matrices(overlay):
        some = owners[".".join(path)]
        leaf = {key: np.asarray(value) for key, value in factors.items()}
        settings = ranks_and_alphas(".".join(path), lora, model.num_layers)
        for module, (rank, alpha) in zip(some, settings, strict=True):
            a, b = leaf["a"][module.layer], leaf["b"][module.layer]
            if a[..., rank:].any() and b[rank:].any():
                raise UserError(
                    f"{'.'.join(path)}: has more than rank {rank} in layer {module.layer}"
                )
            if not (a.any() or b.any() or lora.dora):
                continue
            low[module] = rank, alpha
            put(module, module.factors[0], a[..., :rank], module.spec.inputs)
            put(module, module.factors[1], b[:rank], 1)
            if lora.dora:
                put(module, _NORMS, leaf["m"][module.layer].reshape(-1), 0)
    for path, leaf in whole_leaves(overlay):
        for module in owners[".".join(path[:-1])]:
            whole.append(module)
            one = np.asarray(leaf if module.layer is None else leaf[module.layer])
            one = one[: module.spec.shape[0]]  # a table without its padding
            put(module, "weight", one, module.spec.inputs)
            if model.tie_embeddings and module.is_table:
                (head,) = owners["head"]
                whole.append(head)
                put(head, "weight", one, 0)
    tied = model.tie_embeddings and any(module.is_table for module in whole)
    saved = list(dict.fromkeys(module.short for module in whole))
    config = write_config(lora, base, saved=saved, tied=tied, **_named(low, lora, model.num_layers))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with outputs.new_folder(folder, last=CONFIG) as new:
        with Progress(f"write {folder.name}", sum(map(nbytes, tensors.values()))) as progress:
            write_safetensors(new / _WEIGHTS, tensors, progress)
        for name, data in (tokenizer_files(tokenizer) if tokenizer else {}).items():
            storage.write_bytes(new / name, data)
        storage.write_bytes(new / CONFIG, text.encode())


def _named(
    low: Mapping[Module, tuple[int, float]], lora: LoraConfig, layers: int
) -> dict[str, Any]:
    """Targets, and the ranks and alphas that are others than the usual, by the shortest names."""
    targets: list[str] = []
    ranks, alphas = {}, {}
    for some in _owners(low).values():
        everywhere = len(some) == layers
        alike = everywhere and len({low[module] for module in some}) == 1
        targets += [some[0].short] if everywhere else [module.name for module in some]
        for module in some[:1] if alike else some:
            rank, alpha = low[module]
            key = module.short if alike else module.name
            if rank != lora.rank:
                ranks[key] = rank
            if alpha != lora.alpha:
                alphas[key] = alpha
    return {"targets": targets, "ranks": ranks, "alphas": alphas}


@dataclasses.dataclass(frozen=True, eq=False)
class _Held:
    """A tensor in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> str:
        return self.array.dtype.name

    def read(self) -> np.ndarray:
        """In C order."""
        return np.ascontiguousarray(self.array)


def _word(owner: str) -> str:
    """The name by which a config knows a matrix, or what is trained whole."""
    return owner.rpartition(".")[2]
