"""Loads, overrides and saves configs; a recipe is the config of a run.

A recipe is YAML. Dotted overrides are set in its values, then pydantic validates the result into
the frozen dataclasses of `jllama.config`: unknown keys, wrong types and impossible values raise
`UserError`, one line that names the key.
"""

import dataclasses
import json
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pydantic

from jllama.config import Config, ModelConfig, StoredConfig, schema
from jllama.config.overrides import override
from jllama.config.plain_yaml import format_yaml, parse_yaml
from jllama.config.shorten import shorten_schedule
from jllama.config.suggestions import meant_names
from jllama.errors import UserError
from jllama.files import storage

T = typing.TypeVar("T")
Architecture = Callable[[str], ModelConfig]  # of the model in a folder of any format
_STORED = {field.name for field in dataclasses.fields(StoredConfig)}


def configs_folder() -> Path:
    """Returns the folder of shipped configs: `configs/` of the checkout, or its copy in a wheel."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "model").is_dir():
            return folder
    raise UserError("the shipped configs are missing: reinstall jllama")


def model_names() -> list[str]:
    """Returns the names of the shipped models, for `model: NAME`."""
    return sorted(p.stem for p in (configs_folder() / "model").glob("*.yaml"))


def _read_yaml(path: Path) -> dict:
    try:
        data = parse_yaml(storage.read_text(path))
    except ValueError as e:
        raise UserError(f"{path}: not readable as YAML: {e}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values at the top level")
    return data


def _model_dict(name: str, architecture: Architecture | None) -> dict:
    path = storage.path(name)
    if name not in model_names() and storage.is_folder(path):
        if storage.exists(path / "config.yaml"):
            return to_dict(load_stored(path / "config.yaml").model)
        if architecture is None:
            raise UserError(f"model: {name}: has no config.yaml, which a run and our models have")
        try:
            return to_dict(architecture(name))
        except UserError as e:
            raise type(e)(f"model: {e}") from None
    if path.suffix not in (".yaml", ".yml"):
        path = configs_folder() / "model" / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"model: {_no_model(name)}")
    data = _read_yaml(path)
    if _is_a(Config, data):
        raise UserError(
            f"{name}: is a recipe; what is wanted here is a model: a name, which `jllama info`"
            " lists, or a file such as configs/model/tiny.yaml"
        )
    return data


def _no_model(name: str) -> str:
    near = meant_names(name.rpartition("/")[2], model_names())
    like = f"{' or '.join(near)}? `jllama info` lists the shipped models"
    if "/" in name:
        hint = f"; or did you mean {like}" if len(near) == 1 else ""
        return f"{name}: no such folder; name a run or a model's folder{hint}"
    hint = f"did you mean {like}" if near else f"shipped models: {', '.join(model_names())}"
    return f"no {name!r}; {hint}"


def _is_a(cls: type, data: dict) -> bool:
    """Whether the keys belong to `cls`: `Config` or `ModelConfig`, which share no key."""
    keys = {c: {f.name for f in dataclasses.fields(c)} & data.keys() for c in (Config, ModelConfig)}
    return bool(keys[cls]) and sum(map(len, keys.values())) == len(keys[cls])


def load_model(
    name: str, overrides: Sequence[str] = (), architecture: Architecture | None = None
) -> ModelConfig:
    """A shipped model by name, a YAML file, or a folder of a run or model.

    Args:
      overrides: dotted `key=value`.
      architecture: reads folders of other formats, which without it are errors.
    """
    data = override(_model_dict(name, architecture), overrides, ModelConfig)
    return validate(ModelConfig, data, where=name, given=overrides)


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    architecture: Architecture | None = None,
) -> Config:
    """Reads a recipe, applies dotted overrides (`model.num_layers=4`), validates.

    The key `from` names a model's folder: its architecture, its parameters to begin from and its
    tokenizer. In a file the recipe's own keys win over it, and `from=PATH` among the overrides wins
    over the file, but not over other overrides. An override of `training.steps` shortens a
    schedule that is longer.

    Args:
      architecture: reads folders of other formats, which without it are errors.
    """
    path = storage.path(path)
    data = _read_yaml(path)
    folder = data.pop("from", None)
    if folder is not None:
        implied = _implied(folder)
        training = implied["training"] | (data.get("training") or {})
        data = implied | data | {"training": training}
    if _is_a(ModelConfig, data):
        raise UserError(
            f"{path}: is a model; what is wanted here is a recipe, such as"
            f" configs/train/tiny.yaml, with --model={path}"
        )
    # `model=NAME` is the model's whole file, wherever it stands; other overrides go on top of it,
    # and the recipe's own changes on top of its `base`.
    rest = []
    for item in sorted(overrides, key=lambda item: not item.startswith("from=")):
        key, _, value = item.partition("=")
        if key == "from":
            folder, implied = value, _implied(value)
            data |= implied | {"training": (data.get("training") or {}) | implied["training"]}
        elif key == "model" and not value.lstrip().startswith("{"):
            data["model"] = value
        elif key == "model.base" and isinstance(data.get("model"), dict):
            data["model"]["base"] = value
        else:
            rest.append(item)
    match data.get("model"):
        case str(name):
            # A shipped architecture has no parameters to begin from.
            if name == folder and not storage.is_folder(storage.path(name)):
                raise UserError(f"from: {name}: no such folder; name a run or a model's folder")
            data["model"] = _model_dict(name, architecture)
        case {"base": str(name), **changes}:
            data["model"] = _model_dict(name, architecture) | changes
    training = data.get("training")
    steps = training.get("steps") if isinstance(training, dict) else None
    data = override(data, rest, Config)
    shorten_schedule(data, steps, rest)
    return validate(Config, data, where=str(path), given=rest)


def _implied(folder: Any) -> dict[str, Any]:
    """The keys that `from` stands for."""
    if not isinstance(folder, str) or not folder:
        raise UserError(f"from: {folder!r}: expected the path of a model's folder")
    return {
        "model": folder,
        "training": {"init_from": folder},
        "tokenizer": {"kind": "file", "path": folder},
    }


def load_stored(path: Path) -> StoredConfig:
    """Reads what a folder's config.yaml says about its parameters; a run's is a whole recipe."""
    data = _read_yaml(path)
    return validate(StoredConfig, {k: v for k, v in data.items() if k in _STORED}, str(path))


def validate(cls: type[T], data: dict, where: str, given: Sequence[str] = ()) -> T:
    """Makes a config of plain values, such as those of `to_dict`.

    The UserError names the key as an option if one of the overrides `given` has set it, and the
    file `where` otherwise.
    """
    try:
        # JSON mode: strict about types, and lists still become tuples.
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
    except (TypeError, ValueError) as e:
        if isinstance(e, pydantic.ValidationError):
            keys, text = schema.explain(cls, e)
            options = [item.partition("=")[0] for item in given]
            if all(_is_given(key, options) for key in keys):
                raise UserError(f"{', '.join(f'--{key}' for key in keys)}: {text}") from None
            beneath = any(o.startswith(f"{key}.") for key in keys for o in options)
            place = "" if beneath else f"{where}: "
            raise UserError(f"{place}{', '.join(keys)}: {text}") from None
        raise UserError(f"{where}: has values that JSON cannot express: {e}") from None


def _is_given(key: str, options: Sequence[str]) -> bool:
    """Whether an override set the key, or chose a kind that needs it."""
    kind = f"{key.rpartition('.')[0]}.kind"
    return any(key == o or key.startswith(f"{o}.") or kind == o for o in options)


def to_dict(config: Any) -> Any:
    """Returns a config as plain nested values, for YAML and JSON."""
    return json.loads(pydantic.TypeAdapter(type(config)).dump_json(config, by_alias=True))


def to_yaml(config: Any) -> str:
    """Writes the resolved config as YAML; `load` reads an equal config from it."""
    return format_yaml(to_dict(config))


def from_arguments(argv: Sequence[str], architecture: Architecture) -> Config:
    """Loads the recipe of a command line: `--config F --section.key=value --section.key value`.

    `architecture` is that of `load`.
    """
    pairs, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r}: expected --config FILE or --section.key=value")
        key, eq, value = word[2:].partition("=")
        if not eq:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key}: needs a value")
            value = rest.pop(0)
        pairs.append((key, value))
    files = [value for key, value in pairs if key == "config"]
    if len(files) != 1:
        raise UserError(f"--config FILE: must be given once; shipped: {', '.join(_recipes())}")
    overrides = [f"{key}={value}" for key, value in pairs if key != "config"]
    return load(files[0], overrides, architecture)


def _recipes() -> list[str]:
    return [f"configs/train/{p.name}" for p in sorted((configs_folder() / "train").glob("*.yaml"))]


def help_text() -> str:
    """Returns a line for every key of a recipe, with its type, meaning and default."""
    rows = [(f"--{key}", kind, meaning) for key, kind, meaning in schema.describe_keys(Config)]
    width = max(len(key) for key, _, _ in rows)
    lines = [f"{key:{width}}  {kind}: {meaning}" for key, kind, meaning in rows]
    recipes = "\n  ".join(_recipes())
    return (
        f"--config FILE: the recipe; shipped:\n  {recipes}\n\n"
        "--from PATH: a model's folder in any format; the same as --model=PATH"
        " --training.init_from=PATH --tokenizer.kind=file --tokenizer.path=PATH, which can each"
        " still be set\n\nKeys:\n" + "\n".join(lines)
    )
