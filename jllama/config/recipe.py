"""Recipes: how a config is loaded, overridden and saved.

A recipe is YAML. OmegaConf merges it with dotted overrides, then pydantic validates the result into
the frozen dataclasses of `jllama.config`: unknown keys, wrong types and impossible values raise
`UserError`, one line that names the key.
"""

import dataclasses
import io
import json
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jllama.config import Config, ModelConfig, StoredConfig, schema
from jllama.errors import UserError
from jllama.files import storage

T = typing.TypeVar("T")
Architecture = Callable[[str], ModelConfig]  # of the model in a folder of any format
_STORED = {field.name for field in dataclasses.fields(StoredConfig)}


def configs_folder() -> Path:
    """The shipped recipes: `configs/` of the checkout, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "model").is_dir():
            return folder
    raise UserError("the shipped configs are missing: reinstall jllama")


def model_names() -> list[str]:
    """Names of the shipped models, as `model: NAME` takes them."""
    return sorted(p.stem for p in (configs_folder() / "model").glob("*.yaml"))


def _read_yaml(path: Path) -> dict:
    try:
        loaded = OmegaConf.load(io.StringIO(storage.read_text(path)))
        data = OmegaConf.to_container(loaded, resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as e:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(e).split())}") from None
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
            if "/" in name:
                raise UserError(f"model: {name}: no such folder; name a run or a model's folder")
            raise UserError(f"model: no {name!r}; shipped models: {', '.join(model_names())}")
    data = _read_yaml(path)
    if _is_a(Config, data):
        raise UserError(
            f"{name}: is a recipe; what is wanted here is a model: a name, which `jllama info`"
            " lists, or a file such as configs/model/tiny.yaml"
        )
    return data


def _is_a(cls: type, data: dict) -> bool:
    """Whether the keys are those of this one of `Config` and `ModelConfig`, which share none."""
    own, other = ({f.name for f in dataclasses.fields(c)} for c in (Config, ModelConfig))
    if cls is ModelConfig:
        own, other = other, own
    return bool(own & data.keys()) and not other & data.keys()


def load_model(
    name: str, overrides: Sequence[str] = (), architecture: Architecture | None = None
) -> ModelConfig:
    """A shipped model by name, a YAML file, or a folder of a run or model.

    Args:
      overrides: dotted `key=value`.
      architecture: reads folders of other formats, which without it are errors.
    """
    data = override(_model_dict(name, architecture), overrides)
    return _validate(ModelConfig, data, where=name, given=overrides)


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    architecture: Architecture | None = None,
) -> Config:
    """Reads a recipe, applies dotted overrides (`model.num_layers=4`), validates.

    The key `from` names a model's folder: its architecture, its parameters to begin from and its
    tokenizer. In a file the recipe's own keys win over it, and `from=PATH` among the overrides wins
    over the file, but not over other overrides.

    Args:
      architecture: reads folders of other formats, which without it are errors.
    """
    path = storage.path(path)
    data = _read_yaml(path)
    if "from" in data:
        implied = _implied(data.pop("from"))
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
            implied = _implied(value)
            data |= implied | {"training": (data.get("training") or {}) | implied["training"]}
        elif key == "model" and not value.lstrip().startswith("{"):
            data["model"] = value
        elif key == "model.base" and isinstance(data.get("model"), dict):
            data["model"]["base"] = value
        else:
            rest.append(item)
    match data.get("model"):
        case str(name):
            data["model"] = _model_dict(name, architecture)
        case {"base": str(name), **changes}:
            data["model"] = _model_dict(name, architecture) | changes
    return _validate(Config, override(data, rest), where=str(path), given=rest)


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
    """What a folder's config.yaml says of the parameters in it; of a run, a part of its recipe."""
    data = _read_yaml(path)
    return _validate(StoredConfig, {k: v for k, v in data.items() if k in _STORED}, str(path))


def override(data: dict, overrides: Sequence[str]) -> dict:
    """Sets dotted `key=value` in plain nested values, in place, before validation."""
    given: set[str] = set()
    for item in overrides:
        key, eq, text = item.partition("=")
        if not eq or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
            raise UserError(f"{item!r}: an override is written key=value, with dots inside the key")
        try:
            value = OmegaConf.to_container(OmegaConf.create({"v": _scalar(text)}))["v"]
        except (yaml.YAMLError, OmegaConfBaseException) as e:
            raise UserError(
                f"{key}: {text!r} is not a YAML value: {' '.join(str(e).split())}"
            ) from None
        _assign(data, key, value, given)
        given.add(key)
    return data


def _scalar(text: str) -> Any:
    # OmegaConf's own dotlist parser reads 1e-3 as a number, which plain YAML 1.1 does not.
    if re.fullmatch(r"(\d+:\d+)?", text):
        return text  # nothing is no null; YAML 1.1 takes FROM:TO for a number in base 60
    value = OmegaConf.to_container(OmegaConf.from_dotlist([f"v={text}"]))["v"]
    # Plain text is taken as it stands: YAML would drop spaces at its ends and what follows " #".
    plain = isinstance(value, str) and not text.lstrip().startswith(("'", '"', "|", ">", "&", "!"))
    return text if plain else value


def _assign(data: dict, key: str, value: Any, given: set[str]) -> None:
    node: Any = data
    *parents, last = key.split(".")
    for i, name in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, name, ".".join(parents[: i + 1]))]
        else:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, (dict, list)):
            raise UserError(f"{key}: {'.'.join(parents[: i + 1])} is a single value, without keys")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif last == "kind" and node.get("kind") != value:
        # Another member of a sum type: the keys of the old one mean nothing in it. Those that an
        # earlier override set are meant for the new one.
        kept = {k: v for k, v in node.items() if ".".join([*parents, k]) in given}
        node.clear()
        node |= kept | {"kind": value}
    else:
        node[last] = value


def _index(node: list, name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise UserError(f"{key}: a list of {len(node)} takes an index below {len(node)}")
    return int(name)


def _validate(cls: type[T], data: dict, where: str, given: Sequence[str] = ()) -> T:
    """`where` names the file in errors, and `given` are overrides: of these it names the key."""
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
        raise UserError(f"{where}: not plain values: {e}") from None


def _is_given(key: str, options: Sequence[str]) -> bool:
    """Whether a key was set by an override, or is needed for the kind that one chose."""
    kind = f"{key.rpartition('.')[0]}.kind"
    return any(key == o or key.startswith(f"{o}.") or kind == o for o in options)


def to_dict(config: Any) -> Any:
    """Plain nested values of a config, fit for YAML and JSON."""
    return json.loads(pydantic.TypeAdapter(type(config)).dump_json(config))


def from_dict(data: dict, where: str) -> Config:
    """The inverse of `to_dict` for a whole recipe; `where` names the file in errors."""
    return _validate(Config, data, where)


def to_yaml(config: Any) -> str:
    """The resolved config as YAML; `load` reads it back to an equal config."""
    # OmegaConf's own writer: it quotes every text that its reader would take for a number.
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(to_dict(config))))


def _escaped(value: Any) -> Any:
    """Nested values in which no text is an interpolation: `load` would resolve `${...}`."""
    match value:
        case dict():
            return {k: _escaped(v) for k, v in value.items()}
        case list():
            return [_escaped(v) for v in value]
        case str():
            return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)
    return value


def from_arguments(argv: Sequence[str], architecture: Architecture) -> Config:
    """The recipe of a command line: `--config F --section.key=value --section.key value ...`.

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
        raise UserError(f"--config FILE: give it once; shipped: {', '.join(_recipes())}")
    return load(
        files[0], [f"{key}={value}" for key, value in pairs if key != "config"], architecture
    )


def _recipes() -> list[str]:
    return [f"configs/train/{p.name}" for p in sorted((configs_folder() / "train").glob("*.yaml"))]


def help_text() -> str:
    """Every key of a recipe with its type, meaning and default, one a line."""
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
