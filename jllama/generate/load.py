"""Opening a trained model: `jllama.load`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax

from jllama.adapt import lora
from jllama.adapt.mixture import join_overlays
from jllama.adapt.quant import quantizer
from jllama.chips import use_compilation_cache
from jllama.config import MeshConfig, ModelConfig, ShardingConfig
from jllama.errors import UserError
from jllama.files import storage
from jllama.generate.llama import Llama
from jllama.model import llama
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.progress import note
from jllama.store.find import Found, find
from jllama.store.model import open_adapted, read_base
from jllama.text.interface import Tokenizer
from jllama.text.keys import GENERATION, note_sampling


def load(
    path: str | Path,
    dtype: str | None = None,
    model: str | None = None,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    tokenizer: str | Path | None = None,
    max_length: int | None = None,
) -> Llama:
    """A trained model: a run (its newest checkpoint), a step of it, or a model's folder.

    Args:
      path: a run folder, RUN/checkpoints/STEP, or a folder of this project, Hugging Face or Meta;
        local, or a URL: gs://, s3://. Or an adapter, which is loaded over its base.
      dtype: "float32" or "bfloat16" for the computation; default the run's own, or what the folder
        is stored in (float32 for float16). Matrices are kept in it too, which changes no result:
        they would be cast at every use. Norms are kept in float32.
      model: what a folder of Meta's is, where it does not say all: a name in configs/model, or a
        file like those.
      adapter: one to load over the model, or several by name: a run with `adapt.kind=lora`, a step
        of it, or a folder of PEFT's. What was trained over a quantised base gets one.
      tokenizer: the path of another than the folder's, or "none".
      max_length: the positions that the model reads, where the folder's are not right.

    Raises:
      UserError: if the path is none of these, the run has no checkpoint, the folder holds what
        cannot be expressed here, the dtype is another, an adapter is one of another model, or
        several cannot be had together.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}: must be float32 or bfloat16")
    path = storage.path(path)
    if isinstance(adapter, str | Path):
        adapter = {storage.path(adapter).name: adapter}
    if not isinstance(adapter, Mapping | None):
        raise UserError(f"adapter={adapter!r}: expected a path, or several by name: {{name: path}}")
    stored = open_adapted(find(path), adapter, model, tokenizer, max_length)
    _note_generation(stored.found, stored.tokenizer)
    config, adapters = stored.config, stored.adapters
    use_compilation_cache(stored.compilation_cache)
    compute = stored.compute if dtype is None else dataclasses.replace(stored.compute, dtype=dtype)
    placement, placed = _placed(config, compute.dtype)
    overlays, whole = None, ()
    if not adapters:
        params = stored.read(placed)
    else:
        kind = next(a.quantize for a in adapters.values())
        params, digest = read_base(stored, placed, quantizer(config, kind))
        read = [a.read(config, placement, params, digest) for a in adapters.values()]
        whole = tuple(path for _, o in read for path in lora.whole_leaves(o))
        params, overlays = join_overlays(params, read, tuple(adapters))
    return Llama(config, params, stored.tokenizer, compute, tuple(adapters), overlays, whole)


def _note_generation(found: Found, tokenizer: Tokenizer | None) -> None:
    """Says what the folder asks of generation, and what is done otherwise here."""
    if found.format == "hf" and GENERATION in found.files:
        note_sampling(found.folder / GENERATION, storage.read_json(found.folder / GENERATION))
    if tokenizer is not None and tokenizer.adds_eos:
        note(
            f"{found.path}: its tokenizer ends every text with EOS; a prompt gets none here,"
            " because it is to be continued"
        )


def _placed(config: ModelConfig, dtype: str) -> tuple[Placement, llama.Params]:
    """Shapes on this process's devices, or on one of them where the model's sizes do not divide.

    They are not those of the training: the run's mesh and placement say nothing.
    """

    def on(devices: list[jax.Device]) -> tuple[Placement, llama.Params]:
        placement = Placement(make_mesh(MeshConfig(), devices), ShardingConfig())
        return placement, llama.placed_shapes(config, placement, dtype, "float32")

    devices = jax.local_devices()
    try:
        return on(devices)
    except UserError:
        return on(devices[:1])
