"""The run folder: what begins it, who may go on in it, and what all processes must agree on.

RUN/config.yaml  the resolved recipe      RUN/checkpoints/STEP  parameters, optimizer state
RUN/tokenizer.model, or tokenizer.json     RUN/metrics.jsonl, RUN/tensorboard
RUN/data.json    digests of the prepared text
RUN/base.json    of an overlay: the model that it adapts, and the digest of its parameters
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from jllama.config import Config, LoraConfig
from jllama.config import recipe as recipes
from jllama.data.opening import Data, open_data, open_tokenizer
from jllama.errors import UserError
from jllama.files import storage
from jllama.files.locks import locked
from jllama.progress import say
from jllama.store.checkpoint import latest_step
from jllama.text.tokenizer import Tokenizer, load_tokenizer

_DATA = "data.json"

# What may change between two runs in one folder: none of it changes what a step computes, but for
# the order of sums on another mesh.
_FREE = (
    "run.folder", "run.name", "run.log_every", "run.profile", "run.stop_after",
    "run.compilation_cache", "checkpoint.", "data.prefetch", "data.prepare.folder",
    "data.prepare.cache", "data.prepare.workers", "distributed.", "mesh.", "sharding.", "eval.",
    "sample.",
)  # fmt: skip


def begin(
    config: Config, folder: Path, stack: contextlib.ExitStack, initial: Tokenizer | None = None
) -> Data:
    """The leader's part: the folder, locked until `stack` ends, its tokenizer and the data.

    `initial` is the tokenizer of the model that the run begins from.
    """
    busy = "another process trains here; choose another run.name"
    stack.enter_context(locked(folder, busy=busy))
    if latest_step(folder):
        _check_same_config(folder, config)
        tokenizer = load_tokenizer(folder)  # the run's own, whatever the recipe's is by now
        data = open_data(config, tokenizer)
        _check_same_data(folder, data)
    else:
        tokenizer = open_tokenizer(config)
        if initial is not None and initial.digest != tokenizer.digest:
            where = config.training.init_from
            say(
                f"note: the tokenizer is not that of training.init_from={where}, whose parameters"
                f" know other ids: --tokenizer.kind=file --tokenizer.path={where} takes it"
            )
        data = open_data(config, tokenizer)
        tokenizer.save(folder)
        storage.write_text(folder / _DATA, digests(data))
    _note_unused_rows(config.model.vocab_size, tokenizer.vocab_size)
    storage.make_folder(folder / "checkpoints")  # Orbax has a traceback for a file in its place
    storage.write_text(folder / "config.yaml", recipes.to_yaml(config))
    return data


def _note_unused_rows(rows: int, pieces: int) -> None:
    # Fewer are padding, to a number that divides well.
    if rows - pieces > rows // 100:
        say(
            f"note: {rows - pieces:,} of model.vocab_size={rows:,} rows have no piece: the"
            f" tokenizer has {pieces:,}"
        )


def join(config: Config, folder: Path) -> Data:
    """The others' part: the run's tokenizer, and the data prepared with it."""
    if not storage.exists(folder / "config.yaml"):
        raise UserError(
            f"{folder}: process 0 made it, and it is not here: run.folder must be on storage that"
            " all processes share"
        )
    return open_data(config, load_tokenizer(folder))


def advice(folder: Path) -> str:
    """What to do after a failure."""
    step = latest_step(folder)
    return f"the same command resumes from step {step}" if step else "the same command starts anew"


def told_alike(config: Config) -> str:
    """The keys that must be the same in all processes: all but where a host keeps its own."""
    own = ("distributed.process_id", "data.prepare.", "run.compilation_cache")
    keys = flatten(recipes.to_dict(config))
    return json.dumps({k: v for k, v in sorted(keys.items()) if not k.startswith(own)})


def digests(data: Data) -> str:
    """What the run's tokens are, by source: the text of data.json."""
    return json.dumps(_digests(data), indent=1)


def _digests(data: Data) -> dict[str, dict[str, str]]:
    parts = {"train": data.sources, "held_out": data.held_out}
    return {p: {name: x.digest for name, x in some.items()} for p, some in parts.items()}


def _check_same_data(folder: Path, data: Data) -> None:
    try:
        before = json.loads(storage.read_text(folder / _DATA))
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"{folder / _DATA}: not readable, the run's data is unknown: {e}") from None
    for part, digests in _digests(data).items():
        for name, digest in digests.items():
            if before[part].get(name, digest) != digest:
                raise UserError(
                    f"{folder}: the {part} source {name} is not the text that this run began with"
                    " (a changed file, or another Python's standard library); choose another"
                    " run.name or bring the text back"
                )


def _check_same_config(folder: Path, config: Config) -> None:
    old = recipes.load(folder / "config.yaml")
    before, after = flatten(recipes.to_dict(old)), flatten(recipes.to_dict(config))
    # A base may lie elsewhere by now: `note_base` compares its parameters.
    adapts = isinstance(config.adapt, LoraConfig)
    free = (*_FREE, "training.init_from", "adapt.base") if adapts else _FREE
    changed = [
        f"{key}: {before.get(key, 'absent')} there, {after.get(key, 'absent')} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, ...) != after.get(key, ...) and not key.startswith(free)
    ]
    if changed:
        more = f" (and {len(changed) - 5} more)" if len(changed) > 5 else ""
        raise UserError(
            f"{folder} holds a run of another config: {'; '.join(changed[:5])}{more};"
            " choose another run.name or delete the folder"
        )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values as {dotted key: value}."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(x, dict) for x in tree):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {
        k: v for key, value in items
        for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }  # fmt: skip
