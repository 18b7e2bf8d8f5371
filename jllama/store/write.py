"""Writes models and adapters in this project's format: each host reads its own shards alone.

A folder appears whole or not at all. At a URL its files appear one by one: config.yaml is written
last, and a folder without it counts as nothing.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import jax

from jllama.adapt.lora import Overlay
from jllama.config import ComputeConfig, LoraConfig, ModelConfig, StoredConfig
from jllama.config.recipe import to_yaml
from jllama.files import outputs, storage
from jllama.model import llama
from jllama.progress import say
from jllama.store.adapter import FACTORS, note_base
from jllama.store.checkpoint import Checkpoints, room_for
from jllama.store.find import RECIPE
from jllama.store.fingerprint import fingerprint
from jllama.store.model import StoredModel
from jllama.text.tokenizer import Tokenizer


def write_model(
    folder: Path,
    config: ModelConfig,
    params: llama.Params,
    tokenizer: Tokenizer | None,
    copied: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model alone, float32 or bfloat16 as its parameters are.

    `copied` are the files to write, by name, in place of the tokenizer's own. Raises UserError if
    the folder holds anything.
    """
    dtype, scale_dtype = (
        params[name][leaf].dtype.name
        for name, leaf in (("embedding", "weight"), ("final_norm", "scale"))
    )
    stored = StoredConfig(
        model=config,
        compute=ComputeConfig(dtype=dtype, param_dtype=dtype),
        scale_dtype=None if scale_dtype == dtype else scale_dtype,
    )
    with _new_folder(folder) as new:
        size = sum(x.nbytes for x in jax.tree.leaves(params))
        say(f"write {folder.name}: {size / 1e6:.1f} MB")  # Orbax reports nothing
        _write(new, stored, params, tokenizer.files() if copied is None and tokenizer else copied)


def write_adapter(
    folder: Path,
    base: StoredModel,
    params: llama.Params,
    lora: LoraConfig,
    overlay: Overlay,
    copied: Mapping[str, bytes] | None = None,
) -> None:
    """Writes an adapter alone: `overlay`, over the parameters `params` of the model `base`.

    `copied` is that of `write_model`. Raises UserError if the folder holds anything.
    """
    stored = StoredConfig(model=base.config, compute=FACTORS, adapt=lora)
    with _new_folder(folder) as new:
        note_base(new, str(storage.absolute(base.place)), fingerprint(params, "bfloat16"))
        files = base.tokenizer.files() if copied is None and base.tokenizer else copied
        _write(new, stored, overlay, files)


def _write(
    new: Path, stored: StoredConfig, tree: llama.Params, files: Mapping[str, bytes] | None
) -> None:
    checkpoints = Checkpoints(new, keep=1, copies=room_for(tree))
    checkpoints.save(0, trainable=tree)
    checkpoints.close()
    for name, data in (files or {}).items():
        storage.write_bytes(new / name, data)
    storage.write_text(new / RECIPE, to_yaml(stored))


def _new_folder(folder: Path) -> contextlib.AbstractContextManager[Path]:
    outputs.check_absent(folder)
    # At a URL Orbax writes in place.
    remote = storage.is_remote(folder)
    return contextlib.nullcontext(folder) if remote else outputs.new_folder(folder, RECIPE)
