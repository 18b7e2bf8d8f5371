"""The folder of a run: how it is begun and resumed, and what processes agree on.

RUN/config.yaml        the resolved recipe
RUN/tokenizer.model    the tokenizer; or tokenizer.json
RUN/data.json          digests of the prepared text
RUN/base.json          where an overlay is trained: its base, and the fingerprint of its parameters
RUN/initial.json       what the run began with, unless with fresh parameters: path and fingerprint
RUN/changes.jsonl      what later starts changed of the recipe, and at which step
RUN/checkpoints/STEP   what is trained, and the optimizer's state
RUN/metrics.jsonl      the metrics of every step; RUN/tensorboard holds the same
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from jllama.config import Config, NoRopeScaling, TokenizerFile
from jllama.config import recipe as recipes
from jllama.data.opening import Data, open_data, open_tokenizer
from jllama.errors import UserError
from jllama.files import storage
from jllama.files.locks import locked
from jllama.parallel import distributed
from jllama.progress import say
from jllama.store.find import CHECKPOINTS, RECIPE, latest_step
from jllama.store.model import StoredModel
from jllama.text.infill import Infill, parse_prompt, prompt_ids
from jllama.text.tokenizer import Tokenizer, load_tokenizer
from jllama.train.branch import Branch
from jllama.train.changes import check_changes, flatten, note_changes

_DATA = "data.json"


def run_folder(config: Config) -> Path:
    """The run's folder, `run.folder`/`run.name`; it may be a URL."""
    return storage.path(config.run.folder) / config.run.name


@contextlib.contextmanager
def open_run(
    config: Config, *, initial: StoredModel | None = None, branch: Branch | None = None
) -> Iterator[tuple[Path, Data]]:
    """Opens the run's folder and its data to train: the context is (folder, data).

    Every process enters it. Process 0 locks the folder for as long as the context lasts, writes
    config.yaml, tokenizer and data.json, and prepares text that is not prepared yet. When the
    folder holds a checkpoint, the tokenizer is the folder's.

    Raises `UserError`, in all processes, when a resumed run has another config or other text, when
    another process trains in the folder, or when sources cannot be read.

    Args:
      initial: the model that the run begins from; a note says where the recipe's tokenizer is
        another than its own.
      branch: the run's step that the run begins from; its tokenizer is the new run's.
    """
    folder, together = run_folder(config), distributed.together
    with contextlib.ExitStack() as stack:
        leader = distributed.leader()
        # Process 0 makes what is missing while the others wait. They find it, or make their own
        # where prepared data is not on shared storage.
        data = together(lambda: _begin(config, folder, stack, initial, branch) if leader else None)
        data = together(lambda: data or _join(config, folder))
        distributed.check_same(
            "the prepared text", json.dumps(_digests(data), indent=1), "give all the same files"
        )
        yield folder, data


def _begin(
    config: Config,
    folder: Path,
    stack: contextlib.ExitStack,
    initial: StoredModel | None,
    branch: Branch | None,
) -> Data:
    """Process 0's part of `open_run`; `stack` releases the lock."""
    busy = "another process trains here; choose another run.name"
    stack.enter_context(locked(folder, busy=busy))
    step, changes = latest_step(folder) or 0, {}
    if step:
        changes = check_changes(folder, config, step)
        tokenizer = load_tokenizer(folder)  # the recipe's path may hold another one by now
        if any(key.startswith("tokenizer.") for key in changes):
            _check_same_tokenizer(folder, config, tokenizer)
        _check_sample(config, tokenizer)
        data = open_data(config, tokenizer)
        digests = _check_same_data(folder, data)
    else:
        if not (config.training.init_from or branch):
            _note_untrained_positions(config)
        tokenizer = load_tokenizer(branch.run) if branch else open_tokenizer(config)
        if branch and isinstance(config.tokenizer, TokenizerFile):
            _check_same_tokenizer(branch.run, config, tokenizer)
        _check_sample(config, tokenizer)
        own = None if initial is None else initial.tokenizer
        if own is not None and own.digest != tokenizer.digest:
            say(
                f"note: the tokenizer is not that of training.init_from={config.training.init_from}"
                ", whose parameters know other ids: --tokenizer.kind=file"
                f" --tokenizer.path={initial.tokenizer_path} takes it"
            )
        data = open_data(config, tokenizer)
        tokenizer.save(folder)
        digests = _digests(data)
    storage.write_text(folder / _DATA, json.dumps(digests, indent=1))
    _note_unused_rows(config.model.vocab_size, tokenizer.vocab_size)
    # Where a file is in the way this is a UserError; Orbax would raise its own.
    storage.make_folder(folder / CHECKPOINTS)
    storage.write_text(folder / RECIPE, recipes.to_yaml(config))
    note_changes(folder, step, changes)
    return data


def _check_sample(config: Config, tokenizer: Tokenizer) -> None:
    """Raises UserError if the sample at the end of the run cannot be made."""
    new, most = config.sample.max_new_tokens, config.model.max_length
    if not new:
        return
    prompt = parse_prompt("sample.prompt", config.sample.prompt)
    try:
        if isinstance(prompt, Infill):
            ids = prompt_ids(tokenizer, prompt)
        else:
            ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos)
    except UserError as e:
        raise UserError(f"sample.prompt: {e}") from None
    if len(ids) + new > most:
        raise UserError(
            f"sample.prompt: its {len(ids)} tokens and sample.max_new_tokens={new} exceed"
            f" model.max_length={most}; shorten the prompt, or lower sample.max_new_tokens"
        )


def _note_unused_rows(rows: int, pieces: int) -> None:
    # A few unused rows are padding to a size that divides well.
    if rows - pieces > rows // 100:
        say(
            f"note: {rows - pieces:,} of model.vocab_size={rows:,} rows have no piece: the"
            f" tokenizer has {pieces:,}"
        )


def _note_untrained_positions(config: Config) -> None:
    length, most = config.data.length, config.model.max_length
    if length < most and isinstance(config.model.rope, NoRopeScaling):
        sample = ""
        if config.sample.max_new_tokens >= length:
            sample = f" --sample.max_new_tokens={length // 2}"
        say(
            f"note: data.length={length} leaves the positions up to model.max_length={most}"
            f" untrained; --model.max_length={length}{sample} does not claim them"
        )


def _join(config: Config, folder: Path) -> Data:
    """The other processes' part of `open_run`, once process 0 has begun."""
    if not storage.exists(folder / RECIPE):
        raise UserError(
            f"{folder}: process 0 wrote this folder and this process does not see it: run.folder"
            " must be on storage that all processes share"
        )
    return open_data(config, load_tokenizer(folder))


def advice(folder: Path) -> str:
    """What to do after a failure."""
    step = latest_step(folder)
    return f"the same command resumes from step {step}" if step else "the same command starts anew"


def check_same_recipe(config: Config) -> None:
    """Raises `SharedError` unless all processes have the same recipe.

    Keys that may differ from host to host are not compared.
    """
    local = ("distributed.process_id", "data.prepare.", "run.compilation_cache")
    keys = flatten(recipes.to_dict(config))
    text = json.dumps({k: v for k, v in sorted(keys.items()) if not k.startswith(local)})
    distributed.check_same("the recipe", text, "start all with the same arguments")


def _digests(data: Data) -> dict[str, dict[str, str]]:
    """The digest of each source's tokens, by part and name."""
    parts = {"train": data.sources, "held_out": data.held_out}
    return {
        part: {name: prepared.digest for name, prepared in sources.items()}
        for part, sources in parts.items()
    }


def _check_same_tokenizer(folder: Path, config: Config, tokenizer: Tokenizer) -> None:
    if open_tokenizer(config).digest != tokenizer.digest:
        raise UserError(
            f"tokenizer.path={config.tokenizer.path}: is not the tokenizer that the run in {folder}"
            f" began with: --tokenizer.path={folder} is"
        )


def _check_same_data(folder: Path, data: Data) -> dict[str, dict[str, str]]:
    """Returns the digests of the run's sources, those of new held-out ones with them."""
    try:
        before = json.loads(storage.read_text(folder / _DATA))
    except (storage.NoSuchFile, ValueError) as e:
        raise UserError(f"{folder / _DATA}: not readable, the run's data is unknown: {e}") from None
    digests = _digests(data)
    for part, names in digests.items():
        for name, digest in names.items():
            if before[part].get(name, digest) != digest:
                raise UserError(
                    f"{folder}: the {part} source {name} is not the text that this run began with"
                    " (a changed file, or another Python's standard library); choose another"
                    " run.name or bring the text back"
                )
    return {part: before[part] | names for part, names in digests.items()}
