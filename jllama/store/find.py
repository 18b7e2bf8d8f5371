"""What a path holds: a run, a step of one, a model or an adapter, and in which format.

`find` looks once, by one listing of the folder (two for a step of a run); whatever opens the path
afterwards works from its record. The file that names the format:

  jllama  config.yaml: a run, whose newest checkpoint counts, or a model or an adapter alone
  hf      config.json: a model of Hugging Face's
  meta    params.json: a model of Meta's
  peft    adapter_config.json: an adapter of PEFT's, whatever else lies beside it
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from jllama.config import LoraConfig, StoredConfig
from jllama.config.recipe import load_stored
from jllama.errors import UserError
from jllama.files import storage
from jllama.files.runs import CHECKPOINTS, RECIPE, run_and_step
from jllama.interop.names import HF_CONFIG, META_PARAMS, PEFT_CONFIG

# Put last into the folder of a step at a URL, where a step without it is incomplete. The name and
# the meaning are Orbax's on gs://.
COMMITTED = "commit_success.txt"

ModelFormat = Literal["jllama", "hf", "meta"]
_FORMATS: dict[str, ModelFormat] = {RECIPE: "jllama", HF_CONFIG: "hf", META_PARAMS: "meta"}
_MOST_FOLDERS = 16  # in which adapters and runs are looked for: each takes a request at a URL
# How the names of weights begin, and the file that should be beside them.
_WEIGHTS = {
    "adapter_model.": PEFT_CONFIG,
    "model.safetensors": HF_CONFIG,
    "model-0": HF_CONFIG,
    "pytorch_model": HF_CONFIG,
    "consolidated.": META_PARAMS,
}
_EXPECTED = (
    "expected a run or a model with config.yaml in it, RUN/checkpoints/STEP, or a folder of Hugging"
    " Face (config.json), Meta (params.json) or PEFT (adapter_config.json); jllama downloads"
    " nothing"
)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a path holds; nothing but names, and the config.yaml of our own formats, is read yet.

    Attributes:
      path: as it was given.
      folder: where the files are: `path`, or for RUN/checkpoints/STEP the run.
      files: sizes in bytes of the files in `folder`, by name.
      stored: what config.yaml says; None in the formats of others.
      step: the step that `path` names; None where it names none.
    """

    path: Path
    folder: Path
    format: ModelFormat | Literal["peft"]
    files: Mapping[str, int]
    stored: StoredConfig | None = None
    step: int | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether it is an overlay of another model, and no model."""
        if self.stored is None:
            return self.format == "peft"
        return isinstance(self.stored.adapt, LoraConfig)

    @property
    def is_run(self) -> bool:
        """Whether it is a run, or a step of one."""
        return self.stored is not None and self.stored.run is not None

    def checkpoint(self) -> int:
        """The step that counts: the one that the path names, or else the newest.

        Raises UserError if a run has none yet.
        """
        step = latest_step(self.folder) if self.step is None else self.step
        if step is None:
            raise UserError(f"{self.path}: the run has no checkpoint yet; train it first")
        return step


def find(path: Path, format: ModelFormat | None = None) -> Found:
    """Looks at what `path` holds.

    Args:
      format: the model's, where a folder has the files of several; then no adapter is looked for.

    Raises UserError if the path holds neither a model nor an adapter, or if it may be several.
    """
    listing = storage.listing(path)
    files = listing.files
    if format is not None:
        formats = [format]
    elif PEFT_CONFIG in files:
        formats = ["peft"]
    else:
        formats = [format for file, format in _FORMATS.items() if file in files]
    if len(formats) > 1:
        raise UserError(
            f"{path}: may be {' or '.join(formats)}; convert the one that you mean (jllama convert"
            " --from), or give a folder of one alone"
        )
    if formats and formats[0] != "jllama":
        return Found(path, path, formats[0], files)
    if RECIPE in files:
        return Found(path, path, "jllama", files, load_stored(path / RECIPE))
    if run_step := run_and_step(path):
        return _find_step(path, *run_step)
    if format == "jllama":
        raise UserError(f"{path}: no config.yaml, which a run and a model of jllama have")
    # peft saves an adapter that has a name in a folder of that name.
    inner = sorted(listing.folders)[:_MOST_FOLDERS]
    named = [name for name in inner if storage.exists(path / name / PEFT_CONFIG)]
    if len(named) == 1:
        return find(path / named[0])
    if named:
        raise UserError(f"{path}: holds several adapters, {', '.join(named)}; give one's folder")
    raise UserError(f"{path}: {_missing(path, listing)}; {_EXPECTED}")


def _missing(path: Path, listing: storage.Listing) -> str:
    """What a path holds that is neither a model nor an adapter."""
    files, gguf = listing.files, "which jllama writes and does not read"
    packed = sorted(name for name in files if name.endswith(".gguf"))
    if not storage.is_folder(path):
        run, _, step = str(path).rpartition("@")
        if run and step.isdecimal() and storage.exists(storage.path(run) / RECIPE):
            return f"no such folder; the steps of a run lie in it: {run}/{CHECKPOINTS}/{step}"
        if path.suffix == ".gguf":
            return f"a GGUF file, {gguf}"
        return "a file, give its folder" if storage.exists(path) else "no such folder"
    if not files and not listing.folders:
        return "an empty folder"
    if packed:
        return f"holds {packed[0]}, a GGUF file, {gguf}"
    for weights, config in _WEIGHTS.items():
        if any(name.startswith(weights) for name in files):
            return f"has weights and no {config}; copy it from where the weights were saved"
    for name in sorted(listing.folders)[:_MOST_FOLDERS]:
        if storage.exists(path / name / RECIPE):
            return f"neither a model nor an adapter, but {name} in it has a {RECIPE}"
    return "neither a model nor an adapter"


def _find_step(path: Path, run: Path, step: int) -> Found:
    files = storage.listing(run).files
    if RECIPE not in files:
        raise UserError(f"{run}: no config.yaml, which a run and a model of jllama have")
    return Found(path, run, "jllama", files, load_stored(run / RECIPE), step)


def latest_step(run: Path) -> int | None:
    """The newest complete checkpoint of a run; None if there is none."""
    folder = run / CHECKPOINTS
    return next((step for step in reversed(_begun(folder)) if is_complete(folder, step)), None)


def complete_steps(checkpoints: Path) -> list[int]:
    """The complete steps in a folder of checkpoints, in order."""
    return [step for step in _begun(checkpoints) if is_complete(checkpoints, step)]


def _begun(checkpoints: Path) -> list[int]:
    names = storage.listing(checkpoints).folders
    return sorted(int(name) for name in names if name.isdecimal())


def is_complete(checkpoints: Path, step: int) -> bool:
    """Whether a folder of checkpoints has all of a step."""
    if not storage.is_remote(checkpoints):
        return storage.is_folder(checkpoints / str(step))  # Orbax names it once it is complete
    return storage.exists(checkpoints / str(step) / COMMITTED)
