"""RoPE in Hugging Face's config.json, by the table in `jllama.interop.rope_formats`.

There are two schemas: transformers 4 reads rope_theta and rope_scaling, transformers 5 writes
rope_parameters. Both are read, and both are written.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jllama.config import (
    DynamicRopeScaling,
    LinearRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
)
from jllama.errors import UserError
from jllama.interop.json_config import LARGEST, Positive, Size, check, json_dataclass, shortened
from jllama.interop.rope_formats import ORIGINAL, ROPE_FORMATS
from jllama.model.rope import effective_theta, original_length
from jllama.progress import note

_LENGTH = "max_position_embeddings"
_VICUNA = "max_sequence_length"  # a key of Vicuna's files, which transformers ignores


@json_dataclass
class _HfRope:
    """The keys of config.json about RoPE and the length."""

    max_position_embeddings: Size = 2048
    rope_theta: Positive = 1e4
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


@json_dataclass
class _HfKind:
    """The keys of rope_scaling and rope_parameters that are read for every kind."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Literal[1] | None = None
    original_max_position_embeddings: Size | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None


@json_dataclass
class _VicunaLength:
    max_sequence_length: Size | None = None


def read_rope(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling, int]:
    """Returns rope_theta, the kind of RoPE and `max_length` of a parsed config.json.

    max_position_embeddings is the length after scaling for llama3, and as a rule for yarn. For
    linear and dynamic it is the length before it, as transformers documents; some files for linear,
    such as DeepSeek Coder's, have the length after it there, so a line on stderr says what was
    taken. Vicuna's files have a key for the length after it. The table is in docs/interop.md.

    Raises UserError for a bad value, a kind that is not in the table, and schemas that differ.
    """
    file = check(_HfRope, config, where)
    length, parameters = file.max_position_embeddings, file.rope_parameters
    schemas = []
    if parameters is None or file.rope_scaling is not None or "rope_theta" in config:
        schemas.append(_read_schema("rope_scaling", file.rope_scaling or {}, config, file, where))
    if parameters is not None:
        schemas.append(_read_schema("rope_parameters", parameters, config, file, where))
    theta, rope = schemas[-1]
    if schemas[0] != schemas[-1]:
        raise UserError(
            f"{where}: rope_parameters says another RoPE than rope_theta and rope_scaling; correct"
            " one"
        )
    given = check(_VicunaLength, config, where).max_sequence_length or 0
    match rope:
        case DynamicRopeScaling(factor=factor):
            length = max(given, _times(length, factor))
        case LinearRopeScaling() if given:
            length = max(given, length)
        case LinearRopeScaling(factor=factor) if factor > 1:
            note(
                f"{where}: max_length is {factor:g} times {_LENGTH}={length}, the length before"
                f" scaling; if {length} is the length after scaling, convert the model with"
                f" --max-length {length}"
            )
            length = _times(length, factor)
        case YarnRopeScaling(original_length=original, factor=factor):
            length = max(length, _times(original, factor))
    return theta, rope, length


def _times(length: int, factor: float) -> int:
    return min(LARGEST, int(length * factor))


def _read_schema(
    key: str, scaling: Mapping[str, Any], config: Mapping[str, Any], file: _HfRope, where: str
) -> tuple[float, RopeScaling]:
    """Returns rope_theta and the kind of RoPE of one schema; `key` is where `scaling` was."""
    inside = f"{where}: {key}."
    values = {name: value for name, value in scaling.items() if value is not None}
    common = check(_HfKind, values, where, prefix=f"{key}.")
    hf = common.rope_type or common.type or "default"
    if common.type not in (None, hf):
        raise UserError(
            f"{inside}type is {shortened(common.type)}, and rope_type {shortened(hf)}; correct one"
        )
    if scaling and key == "rope_scaling" and not (common.rope_type or common.type):
        raise UserError(f"{inside}rope_type is missing")
    kind = next((kind for kind, format in ROPE_FORMATS.items() if format.hf == hf), None)
    if kind is None:
        readable = ", ".join(dict.fromkeys(f.hf for f in ROPE_FORMATS.values() if f.hf))
        raise UserError(
            f"{inside}rope_type is {shortened(hf)}; the kinds that can be read are {readable}"
        )
    format = ROPE_FORMATS[kind]
    usual = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    if foreign := sorted(values.keys() - {*usual, *format.hf_keys, *format.hf_ignored}):
        value = shortened(values[foreign[0]])
        raise UserError(f"{inside}{foreign[0]} is {value}, which is no key of type {hf!r}")
    theta = common.rope_theta or file.rope_theta
    if key == "rope_scaling" and "rope_theta" in config and theta != file.rope_theta:
        # transformers 5 takes the one inside, 4 the other.
        raise UserError(f"{inside}rope_theta differs from rope_theta; correct one")

    original = common.original_max_position_embeddings or file.max_position_embeddings
    if kind == "dynamic" and original != file.max_position_embeddings:
        # Both versions of transformers take max_position_embeddings.
        raise UserError(f"{inside}{ORIGINAL} differs from {_LENGTH}; correct one")
    if kind in ("dynamic", "yarn"):  # with llama3 the key is required
        values[ORIGINAL] = original
    names = {_field(name): name for name in (*format.hf_keys, ORIGINAL)}
    rope = check(format.scaling, values | {"kind": kind}, where, f"{key}.", names)
    scales = common.mscale, common.mscale_all_dim
    if kind == "yarn" and rope.attention_factor is None and None not in scales:
        up, down = (0.1 * scale * math.log(rope.factor) + 1 for scale in scales)
        rope = dataclasses.replace(rope, attention_factor=up / down)
    if ORIGINAL in format.hf_keys and config.get(ORIGINAL, original) != original:
        # transformers 5 takes this one, 4 the one inside.
        raise UserError(f"{where}: {ORIGINAL} differs from that in {key}; correct one")
    return theta, rope


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json for RoPE and the length, in both schemas.

    Static NTK is written as the larger rope_theta that it is. With linear and dynamic scaling
    max_position_embeddings is the length before it. Raises UserError for a kind that Hugging
    Face's LLaMA does not have.
    """
    rope, format = config.rope, ROPE_FORMATS[config.rope.kind]
    if format.hf is None:
        kinds = ", ".join(kind for kind, format in ROPE_FORMATS.items() if format.hf)
        raise UserError(
            f"model.rope.kind={rope.kind}: Hugging Face's config.json has no such kind; choose one"
            f" of {kinds}, in the config of a copy of the model"
        )
    theta = effective_theta(config)
    numbers = {key: getattr(rope, _field(key)) for key in format.hf_keys}
    # transformers takes these values for keys that are left out; old versions do not know truncate.
    numbers = {key: n for key, n in numbers.items() if n is not None and n is not True}
    lengths = {_LENGTH: config.max_length}
    if isinstance(rope, LinearRopeScaling | DynamicRopeScaling):
        lengths = {_LENGTH: original_length(config), _VICUNA: config.max_length}
    plain = format.hf == "default"
    return lengths | {
        "rope_theta": theta,
        "rope_scaling": None if plain else {format.hf_type: format.hf, **numbers},
        "rope_parameters": {"rope_type": format.hf, **numbers, "rope_theta": theta},
    }


def _field(key: str) -> str:
    """Our field of a number in the file."""
    return "original_length" if key == ORIGINAL else key
