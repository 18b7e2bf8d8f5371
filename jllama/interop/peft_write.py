"""Writes PEFT adapters."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jllama.adapt.lora import Overlay, matrices, ranks_and_alphas, whole_leaves
from jllama.config import LoraConfig, ModelConfig
from jllama.errors import UserError
from jllama.files import outputs, storage
from jllama.interop.hf_tokenizer import export_note, tokenizer_files
from jllama.interop.peft_config import CONFIG, NO_TARGETS, WEIGHTS, plain, write_config
from jllama.interop.peft_modules import NORMS, LowRank, Module, Use, by_owner, modules
from jllama.interop.safetensors import write_safetensors
from jllama.interop.tensors import Tensor, nbytes, to_file
from jllama.progress import Progress, note
from jllama.text.interface import Tokenizer


def write_adapter(
    folder: Path,
    model: ModelConfig,
    lora: LoraConfig,
    overlay: Overlay,
    base: str,
    tokenizer: Tokenizer | None = None,
    copied: Mapping[str, bytes] | None = None,
) -> None:
    """Writes an adapter that peft's `PeftModel.from_pretrained` reads, whole or not at all.

    A layer whose factors are zero, and so can neither change anything nor learn, is left out.

    Args:
      overlay: arrays in float32, float16 or bfloat16; dtypes are kept.
      base: the base's folder or name, for `base_model_name_or_path`.
      tokenizer: written beside the adapter as Hugging Face's files.
      copied: by name the files to write in place of those that are made of the tokenizer.

    Raises UserError if the folder holds anything, or the model is one that Hugging Face's LLaMA
    cannot express.
    """
    owners = by_owner(modules(model))
    uses: dict[Module, Use] = {}
    tensors: dict[str, Tensor] = {}

    def add(module: Module, name: str, array: np.ndarray, inputs: int) -> None:
        array = to_file(array, inputs, interleaved=False)
        read = functools.partial(np.ascontiguousarray, array)
        tensors[module.tensor(name)] = Tensor(array.shape, array.dtype.name, read)

    for path, factors in matrices(overlay).items():
        leaf = {key: np.asarray(value) for key, value in factors.items()}
        by_layer = ranks_and_alphas(path, lora, model.num_layers)
        for module, (rank, alpha) in zip(owners[path], by_layer, strict=True):
            a, b = leaf["a"][module.layer], leaf["b"][module.layer]
            if a[..., rank:].any() and b[rank:].any():
                raise UserError(f"{path}: has more than rank {rank} in layer {module.layer}")
            if not (a.any() or b.any() or lora.dora):
                continue
            uses[module] = LowRank(rank, alpha)
            add(module, module.factors[0], a[..., :rank], module.spec.inputs)
            add(module, module.factors[1], b[:rank], 1)
            if lora.dora:
                add(module, NORMS, leaf["m"][module.layer].reshape(-1), 0)
    for path, leaf in whole_leaves(overlay).items():
        for module in owners[path.rpartition(".")[0]]:
            array = np.asarray(leaf if module.layer is None else leaf[module.layer])
            array = array[: module.spec.shape[0]]  # a table without its padding
            uses[module] = "whole"
            add(module, "weight", array, module.spec.inputs)
            if model.tie_embeddings and module.is_table:
                (head,) = owners["head"]
                uses[head] = "whole"
                add(head, "weight", array, 0)
    if copied is None:
        copied = tokenizer_files(tokenizer) if tokenizer else {}
        if tokenizer and (line := export_note(tokenizer)):
            note(f"{folder}: {line}")
    config = write_config(lora, base, _named(uses, lora, model))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with outputs.new_folder(folder, last=CONFIG) as new:
        with Progress(f"write {folder.name}", sum(map(nbytes, tensors.values()))) as progress:
            write_safetensors(new / WEIGHTS, tensors, progress)
        for name, data in copied.items():
            storage.write_bytes(new / name, data)
        storage.write_bytes(new / CONFIG, text.encode())


def _named(uses: Mapping[Module, Use], lora: LoraConfig, model: ModelConfig) -> dict[str, Any]:
    """The keys that name modules, by the shortest names that are unique.

    Ranks and alphas are those that differ from the overlay's.
    """
    whole = [module for module, use in uses.items() if use == "whole"]
    targets: list[str] = []
    ranks, alphas = {}, {}
    for used in by_owner(module for module in uses if uses[module] != "whole").values():
        everywhere = len(used) == model.num_layers
        alike = everywhere and len({uses[module] for module in used}) == 1
        targets += [used[0].short] if everywhere else [module.name for module in used]
        for module in used[:1] if alike else used:
            rank, alpha = uses[module]
            key = module.short if alike else module.name
            if rank != lora.rank:
                ranks[key] = rank
            if alpha != lora.alpha:
                alphas[key] = plain(alpha)
    return {
        "target_modules": targets or NO_TARGETS,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": list(dict.fromkeys(module.short for module in whole)) or None,
        "ensure_weight_tying": model.tie_embeddings and any(module.is_table for module in whole),
    }
