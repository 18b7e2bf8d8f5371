"""RoPE in Hugging Face's config.json: rope_theta with rope_scaling, and rope_parameters.

transformers 4 reads the former, 5 writes the latter; what is written says it in both.
"""

import math
from typing import Any

from jllama.config import (
    LARGEST_FACTOR,
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    NoRopeScaling,
    NtkRopeScaling,
    RopeScaling,
    YarnRopeScaling,
)
from jllama.errors import UserError
from jllama.interop.hf_values import LARGEST, Reader, short

_THETA = 1e4
# Hugging Face's name of each number of a scaling, and ours.
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
}
_ORIGINAL = "original_max_position_embeddings"
AFTER = "max_sequence_length"  # no key of transformers, but one of Vicuna's files
_YARN = ("factor", "beta_fast", "beta_slow", "attention_factor", "truncate", _ORIGINAL)
_MSCALES = ("mscale", "mscale_all_dim")
_READ = ("linear", "dynamic", "yarn", "llama3")


def read_rope(read: Reader, head_dim: int) -> tuple[float, RopeScaling, int]:
    """theta, the scaling and `max_length`; UserError for what `ModelConfig` cannot express.

    Of dynamic scaling max_position_embeddings is the length before it; ours is `factor` times that.
    Vicuna's files do so with linear scaling, and name the length after it.
    """
    config, length = read.config, read.integer("max_position_embeddings", 2048)
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    theta = read.number("rope_theta", _THETA)
    found = None
    if parameters is None or scaling is not None or "rope_theta" in config:
        given = {} if scaling is None else scaling
        found = _schema(read, "rope_scaling", given, theta, length)
    if parameters is not None:
        new = _schema(read, "rope_parameters", parameters, theta, length)
        if found is not None and new != found:
            raise read.error(
                "rope_parameters", "says another RoPE than rope_theta and rope_scaling; correct one"
            )
        found = new
    theta, rope = found
    if isinstance(rope, DynamicRopeScaling):
        length = min(LARGEST, int(length * rope.factor))
    if isinstance(rope, LinearRopeScaling | DynamicRopeScaling):
        length = max(length, read.integer(AFTER, length, null=True))
    _check_reach(read, rope, length, head_dim, theta)
    return theta, rope, length


def _check_reach(
    read: Reader, rope: RopeScaling, max_length: int, head_dim: int, theta: float
) -> None:
    """What `ModelConfig` asks of a scaling, in the words of the file."""
    if isinstance(rope, DynamicRopeScaling) and head_dim < 4:
        raise read.error("head_dim", f"is {head_dim}; dynamic scaling needs 4 at least")
    if not isinstance(rope, YarnRopeScaling):
        return
    if theta <= 1:
        raise read.error("rope_theta", f"is {theta:g}; yarn needs one above 1")
    original, factor = rope.original_length, rope.factor
    if original > max_length:
        raise read.error(_ORIGINAL, f"is {original}, above max_position_embeddings={max_length}")
    if factor * original < max_length:
        raise read.error(
            "max_position_embeddings",
            f"is {max_length}, beyond yarn's factor {factor:g} times {_ORIGINAL} {original};"
            " correct one",
        )


def _schema(
    read: Reader, key: str, rope: Any, theta: float, max_length: int
) -> tuple[float, RopeScaling]:
    if not isinstance(rope, dict):
        raise read.error(key, f"is {short(rope)}, which is no JSON object")
    kinds = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    if not kinds and rope and key == "rope_scaling":
        raise read.error(key, "has no rope_type")
    if kinds and (not isinstance(kinds[0], str) or kinds[-1] != kinds[0]):
        raise read.error(key, f"has rope_type {' and '.join(map(short, kinds))}")
    kind = kinds[0] if kinds else "default"
    known = {
        "default": (),
        "linear": ("factor", _ORIGINAL),  # the latter has no effect
        "dynamic": ("factor", _ORIGINAL),
        "yarn": (*_YARN, *_MSCALES, "finetuned"),  # the last has no effect, and is in old files
        "llama3": tuple(_LLAMA3),
    }.get(kind)
    if known is None:
        raise read.error(key, f"is of type {kind!r}; what can be read is {', '.join(_READ)}")
    inside = Reader({f"{key}.{name}": value for name, value in rope.items()}, read.where)
    for name, value in rope.items():
        if name == "partial_rotary_factor" and value not in (1, None):
            raise inside.error(f"{key}.{name}", f"is {value!r}, which this model cannot express")
        usual = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *known)
        if name not in usual and value is not None:
            raise inside.error(f"{key}.{name}", f"is no key of type {kind!r}")
    own = inside.number(f"{key}.rope_theta", theta)
    if key == "rope_scaling" and "rope_theta" in read.config and own != theta:
        # transformers 5 takes the one inside, 4 the other.
        raise inside.error(f"{key}.rope_theta", "differs from rope_theta; correct one")
    theta = own
    if kind == "default":
        return theta, NoRopeScaling(kind="none")
    if kind == "yarn":
        return theta, _yarn(read, inside, key, max_length)
    factor = _factor(inside, key)
    if kind == "linear":
        return theta, LinearRopeScaling(kind="linear", factor=factor)
    if kind == "dynamic":
        # Both transformers take max_position_embeddings, whatever is said of an original length.
        if inside.config.get(f"{key}.{_ORIGINAL}") not in (None, max_length):
            raise inside.error(f"{key}.{_ORIGINAL}", "differs from max_position_embeddings")
        return theta, DynamicRopeScaling(kind="dynamic", factor=factor, original_length=max_length)
    numbers = {}
    for theirs, ours in _LLAMA3.items():
        value = inside.integer if theirs == _ORIGINAL else inside.number
        numbers[ours] = value(f"{key}.{theirs}")
    _check_original(read, key, numbers["original_length"])
    if numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise inside.error(f"{key}.high_freq_factor", "must be above low_freq_factor")
    return theta, Llama3RopeScaling(kind="llama3", **numbers)


def _factor(inside: Reader, key: str) -> float:
    factor = inside.number(f"{key}.factor")
    if not 1 <= factor <= LARGEST_FACTOR:
        limits = f"a scaling's factor is from 1 to {LARGEST_FACTOR:,.0f}"
        raise inside.error(f"{key}.factor", f"is {factor:g}; {limits}")
    return factor


def _check_original(read: Reader, key: str, original: int) -> None:
    if read.config.get(_ORIGINAL, original) != original:
        # transformers 5 takes this one, 4 the one inside.
        raise read.error(_ORIGINAL, f"differs from that in {key}; correct one")


def _yarn(read: Reader, inside: Reader, key: str, max_length: int) -> YarnRopeScaling:
    def number(name: str) -> float | None:
        full = f"{key}.{name}"
        return None if inside.config.get(full) is None else inside.number(full)

    factor = _factor(inside, key)
    original = inside.integer(f"{key}.{_ORIGINAL}", max_length, null=True)
    _check_original(read, key, original)
    attention, mscale, all_dim = map(number, ("attention_factor", *_MSCALES))
    if attention is None and mscale is not None and all_dim is not None:
        attention = (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
    fast, slow = number("beta_fast") or 32.0, number("beta_slow") or 1.0
    if fast <= slow:
        raise inside.error(f"{key}.beta_fast", "must be above beta_slow")
    return YarnRopeScaling(
        kind="yarn",
        factor=factor,
        original_length=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=attention,
        truncate=inside.boolean(f"{key}.truncate", True),
    )


def write_rope(rope: RopeScaling) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """rope_scaling, and rope_parameters without rope_theta, in which `ntk` is."""
    match rope:
        case NoRopeScaling() | NtkRopeScaling():
            return None, {"rope_type": "default"}
        case LinearRopeScaling():
            # transformers before 4.43 wants these two keys and no others.
            return {"type": "linear", "factor": rope.factor}, {
                "rope_type": "linear",
                "factor": rope.factor,
            }
        case DynamicRopeScaling():
            return {"type": "dynamic", "factor": rope.factor}, {
                "rope_type": "dynamic",
                "factor": rope.factor,
            }
        case YarnRopeScaling():
            numbers = {
                "factor": rope.factor,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
                _ORIGINAL: rope.original_length,
            }
            if rope.attention_factor is not None:
                numbers["attention_factor"] = rope.attention_factor
            if not rope.truncate:
                numbers["truncate"] = False
            return {"rope_type": "yarn", **numbers}, {"rope_type": "yarn", **numbers}
        case Llama3RopeScaling():
            numbers = {theirs: getattr(rope, ours) for theirs, ours in _LLAMA3.items()}
            return {"rope_type": "llama3", **numbers}, {"rope_type": "llama3", **numbers}
    raise UserError(
        f"model.rope.kind={rope.kind}: Hugging Face's config.json has no name for it; choose"
        f" {', '.join(_READ)} or ntk"
    )
