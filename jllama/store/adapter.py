"""Adapters on storage: a run that trains an overlay, an overlay alone, and PEFT's.

Ours have `adapt` in their config.yaml, the overlay where a model has its parameters, and base.json,
which says what the overlay adapts. PEFT's have adapter_config.json.
"""

import dataclasses
import json
from pathlib import Path

import jax

from jllama.adapt.lora import Overlay, overlay_specs
from jllama.adapt.vocab import resized
from jllama.config import ComputeConfig, LoraConfig, ModelConfig
from jllama.errors import UserError
from jllama.files import storage
from jllama.interop import peft
from jllama.interop.names import PEFT_CONFIG
from jllama.model import llama
from jllama.parallel.sharding import Placement
from jllama.store.find import Found, find, latest_step
from jllama.store.fingerprint import fingerprint
from jllama.store.tokenizer import tokenizer_of
from jllama.text.tokenizer import Tokenizer

BASE = "base.json"
# What may differ between two models of the same parameters, because it decides no shape.
FREE = {"rope", "rope_theta", "rms_norm_eps"}
FACTORS = ComputeConfig(dtype="float32")  # the dtype of an overlay


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter whose overlay is not read yet.

    Attributes:
      found: where it is.
      base: the path of the model that it adapts, as was said where it was made.
      digest: the fingerprint of that model's parameters; None where nobody wrote it down.
      tokenizer: its own; None where it has none.
    """

    found: Found
    base: str
    digest: str | None
    tokenizer: Tokenizer | None

    @property
    def path(self) -> Path:
        """The path that it was opened at."""
        return self.found.path

    @property
    def quantize(self) -> str:
        """What the base's matrices were quantised to when it was trained."""
        return "none" if self.found.stored is None else self.found.stored.adapt.quantize

    @property
    def dtype(self) -> str | None:
        """The dtype of the computation that it was trained in; None where nobody wrote it down."""
        return self.found.stored.compute.dtype if self.found.is_run else None

    def lora(self, config: ModelConfig) -> LoraConfig:
        """What it trains of the model. Raises UserError where it is another model's."""
        if self.found.stored is not None:
            return self.found.stored.adapt
        return peft.read_lora(self.path, config.unpadded)

    def trained_config(self, base: ModelConfig) -> ModelConfig:
        """`base` with the RoPE, epsilon, length and padding that the adapter was trained with."""
        if self.found.stored is None:
            return base
        keys = (*FREE, "max_length", "vocab_multiple")
        trained = self.found.stored.model
        return dataclasses.replace(base, **{key: getattr(trained, key) for key in keys})

    def read(
        self,
        config: ModelConfig,
        placement: Placement,
        base: llama.Params,
        digest: str | None = None,
    ) -> tuple[LoraConfig, Overlay]:
        """Its config and its overlay, float32, over the base's parameters.

        Args:
          digest: the fingerprint of the base that `read_base` gives. Without it `base` must not be
            quantised.

        Raises UserError where it was made for another base: one of other shapes or other values.
        """
        if self.found.stored is None:
            unpadded = resized(base, config.vocab_size)
            lora, host = peft.read_adapter(self.path, config.unpadded, unpadded)
            host = resized(host, config.vocab_rows)
        else:
            lora = self.found.stored.adapt
            self._check(config, digest or fingerprint(base, "bfloat16"))
        placed = llama.place(overlay_specs(config, FACTORS, lora), placement, "float32", "float32")
        if self.found.stored is None:
            return lora, jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), host, placed)
        # Orbax takes a third of a second to import, which other formats do not need.
        from jllama.store.checkpoint import load_params  # noqa: PLC0415

        return lora, load_params(self.found.folder, self.found.checkpoint(), placed)

    def _check(self, config: ModelConfig, digest: str) -> None:
        shapes_differ, lines = differences(self.found.stored.model, config)
        if shapes_differ:
            raise UserError(
                f"{self.path}: is an adapter of another model, {self.base}: {'; '.join(lines)}"
            )
        if digest != self.digest:
            raise UserError(
                f"{self.path}: was trained over other parameters than these, of the same shapes:"
                f" over {self.base} as it was then; give that as the base"
            )


def open_adapter(found: Found, tokenizer: str | Path | None = None) -> Adapter:
    """The adapter that was found. Raises UserError if it is a model, or its base is unknown.

    `tokenizer` is the path of another than the folder's, or "none".
    """
    if not found.is_adapter:
        raise UserError(
            f"{found.path}: a model and no adapter; expected a run with adapt.kind=lora, or a"
            " folder of PEFT's (adapter_config.json)"
        )
    tokenizer = tokenizer_of(found, tokenizer)
    if found.stored is None:
        base = storage.read_json(found.folder / PEFT_CONFIG).get("base_model_name_or_path")
        return Adapter(found, str(base or ""), None, tokenizer)
    if BASE not in found.files:
        raise UserError(
            f"{found.folder}: base.json is missing, which says what the adapter is one of"
        )
    model, digest = read_base_note(found.folder)
    return Adapter(found, model, digest, tokenizer)


def base_of(adapter: Adapter, given: str | None = None) -> Found:
    """The adapter's base: the model at the given path, or where the adapter says that it is.

    Raises UserError if there is no folder.
    """
    path = storage.path(given or adapter.base)
    if given or (adapter.base and storage.is_folder(path)):
        return find(path)
    raise UserError(
        f"{adapter.path}: is an adapter of {adapter.base or 'a model that it does not name'}, which"
        " is not a folder here; say where that is (load(BASE, adapter=...), --model BASE"
        " --adapter ..., convert or info --base BASE, adapt.base in a recipe)"
    )


def note_base(folder: Path, model: str, digest: str) -> None:
    """Writes into a folder which parameters the overlay there adapts.

    Args:
      model: the path of the model.
      digest: the fingerprint of its parameters in bfloat16.

    Raises UserError if the folder has a checkpoint over other parameters.
    """
    if storage.exists(folder / BASE) and latest_step(folder) is not None:
        earlier_model, earlier_digest = read_base_note(folder)
        if earlier_digest != digest:
            raise UserError(
                f"training.init_from={model}: its parameters are not those that the run in {folder}"
                f" began with ({earlier_model}); bring them back, or choose another run.name"
            )
    note = {"model": model, "fingerprint": digest}
    storage.write_text(folder / BASE, json.dumps(note, indent=1) + "\n")


def read_base_note(folder: Path) -> tuple[str, str]:
    """(model, digest) as `note_base` wrote them into the folder of an overlay."""
    try:
        note = json.loads(storage.read_text(folder / BASE))
        return str(note["model"]), str(note["fingerprint"])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder / BASE}: not readable, the base is unknown: {e!r}") from None


def differences(theirs: ModelConfig, ours: ModelConfig) -> tuple[bool, list[str]]:
    """Whether two models have different parameters, and a line for each key that differs."""
    a, b = dataclasses.asdict(theirs), dataclasses.asdict(ours)
    differ = [key for key in b if key not in ("init", "max_length") and a[key] != b[key]]
    lines = [f"model.{key} is {b[key]}, there {a[key]}" for key in differ]
    return bool(set(differ) - FREE), lines
