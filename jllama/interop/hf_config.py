"""Hugging Face's config.json and `ModelConfig`: each from the other.

What a file leaves out has the value that transformers gives it: the defaults are those of
`LlamaConfig` in transformers 4.57.6 and 5.23.0, which agree. What changes the function in either
and the model here cannot express is an error; keys that neither reads under this model type are
left alone.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

from jllama.config import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    NoRopeScaling,
    RopeScaling,
    TruncatedNormalInit,
    YarnRopeScaling,
)
from jllama.errors import UserError
from jllama.text.tokenizer import Tokenizer

_THETA = 1e4
_LARGEST = 100_000_000  # a size, or a length, that is no mistake
# Keys that change the forward pass, with the values at which they do not.
_NEUTRAL: dict[str, tuple] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None, {}),  # code that comes with the weights
    "pruned_heads": (None, {}),
    "is_encoder_decoder": (False, None),
    "is_causal": (True, None),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "num_kv_shared_layers": (None,),
    "kv_sharing_modes": (None,),
    "per_layer_config": (None,),
}
# Hugging Face's name of each number of a scaling, and ours.
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
}
_ORIGINAL = "original_max_position_embeddings"
_YARN = ("factor", "beta_fast", "beta_slow", "attention_factor", "truncate", _ORIGINAL)
_MSCALES = ("mscale", "mscale_all_dim")
_READ = ("linear", "dynamic", "yarn", "llama3")
_QUANTISED = {"quantization_config", "compression_config"}


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that a parsed config.json describes; `init` is the default one.

    Raises UserError, naming `where` and the key, for what is missing, wrong or not expressible.
    """
    read = _Reader(config, where)
    kind = config.get("model_type")
    if kind != "llama":
        said = "is missing" if kind is None else f"is {kind!r}"
        raise read.error("model_type", f"{said}; only 'llama' can be read")
    for key, neutral in _NEUTRAL.items():
        if key in config and config[key] not in neutral:
            hint = "; take the weights before quantisation" * (key in _QUANTISED)
            said = f"is {_short(config[key])}, which this model cannot express{hint}"
            raise read.error(key, said)
    layers = config.get("layer_types")
    if layers is not None and (
        not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)
    ):
        raise read.error("layer_types", "other than full_attention cannot be expressed here")
    hidden_dim, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    kv_heads = read.integer("num_key_value_heads", heads, null=True)
    if heads % kv_heads:
        raise read.error("num_key_value_heads", f"is {kv_heads}, which does not divide {heads}")
    if config.get("head_dim") is None and hidden_dim % heads:
        raise read.error("hidden_size", f"is {hidden_dim}, no multiple of {heads} heads")
    head_dim = read.integer("head_dim", hidden_dim // heads, null=True)
    if head_dim % 2:
        raise read.error("head_dim", f"is {head_dim}, which is odd: RoPE turns pairs")
    max_length = read.integer("max_position_embeddings", 2048)
    theta, rope = _rope(read, max_length)
    if isinstance(rope, DynamicRopeScaling):
        # There it is the length before scaling, and a text may be longer.
        max_length = min(_LARGEST, int(max_length * rope.factor))
    _check_reach(read, rope, max_length, head_dim)
    return ModelConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_dim=hidden_dim,
        num_layers=read.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=read.integer("intermediate_size"),
        max_length=max_length,
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope=rope,
        tie_embeddings=read.boolean("tie_word_embeddings", False),
    )


def write_config(config: ModelConfig, dtype: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json for transformers from 4.31 on; `dtype` is the tensors', such as bfloat16.

    RoPE stands in it as transformers 4 reads it (rope_theta, rope_scaling) and as 5 writes it
    (rope_parameters). Of dynamic scaling, max_position_embeddings is the length before it. Raises
    UserError for a model that is no LLaMA of Hugging Face's.
    """
    if config.qk_norm:
        raise UserError("qk_norm: Hugging Face's LLaMA has none; this model cannot be written")
    if config.hidden_dim % config.num_heads:
        raise UserError(
            f"hidden_dim={config.hidden_dim}: no multiple of num_heads={config.num_heads}, which"
            " transformers 5 asks for; this model cannot be written"
        )
    init = config.init
    std = init.std if isinstance(init, TruncatedNormalInit) else init.embedding_std
    scaling, parameters = _scaling(config.rope)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": (
            config.rope.original_length
            if isinstance(config.rope, DynamicRopeScaling)
            else config.max_length
        ),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {**parameters, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": std,
        "use_cache": True,
        "pretraining_tp": 1,
        # Left out, they would be 1 and 2.
        **(_ends(tokenizer) if tokenizer else {"bos_token_id": None, "eos_token_id": None}),
        # Who it is for: without it, 4.57 takes Llama 3's tokenizer for a broken one of Mistral's.
        "transformers_version": "4.43.0",
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generation_config.json: the ids that begin and end a text, and nothing of sampling."""
    return _ends(tokenizer) if tokenizer else {}


def _ends(tokenizer: Tokenizer) -> dict[str, Any]:
    stop = sorted(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop if len(stop) > 1 else tokenizer.eos_id,
    }


class _Reader:
    """Values of a JSON object, of the types they must have."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config = config
        self.where = where

    def error(self, key: str, what: str) -> UserError:
        return UserError(f"{self.where}: {key} {what}")

    def _get(self, key: str, default: Any, null: bool) -> Any:
        value = self.config.get(key, default)
        if value is None and null:
            value = default
        if value is None:
            raise self.error(key, "is null" if key in self.config else "is missing")
        return value

    def integer(self, key: str, default: int | None = None, null: bool = False) -> int:
        value = self._get(key, default, null)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise self.error(key, f"is {_short(value)}, expected an integer from 1 to {_LARGEST:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default, False)
        # An int may be too large for a float.
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.error(key, f"is {_short(value)}, which is no positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default, False)
        if type(value) is not bool:
            raise self.error(key, f"is {_short(value)}, which is neither true nor false")
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ------------------------------------------------------------------------------------------- RoPE


def _check_reach(read: _Reader, rope: RopeScaling, max_length: int, head_dim: int) -> None:
    """What `ModelConfig` asks of a scaling, in the words of the file."""
    if isinstance(rope, DynamicRopeScaling) and head_dim < 4:
        raise read.error("head_dim", f"is {head_dim}; dynamic scaling needs 4 at least")
    if not isinstance(rope, YarnRopeScaling):
        return
    original, factor = rope.original_length, rope.factor
    if original > max_length:
        raise read.error(_ORIGINAL, f"is {original}, above max_position_embeddings={max_length}")
    if factor * original < max_length:
        raise read.error(
            "max_position_embeddings",
            f"is {max_length}, beyond yarn's factor {factor:g} times {_ORIGINAL} {original};"
            " correct one",
        )


def _rope(read: _Reader, max_length: int) -> tuple[float, RopeScaling]:
    config = read.config
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    theta = read.number("rope_theta", _THETA)
    found = None
    if parameters is None or scaling is not None or "rope_theta" in config:
        given = {} if scaling is None else scaling
        found = _schema(read, "rope_scaling", given, theta, max_length)
    if parameters is not None:
        new = _schema(read, "rope_parameters", parameters, theta, max_length)
        if found is not None and new != found:
            raise read.error(
                "rope_parameters", "says another RoPE than rope_theta and rope_scaling; correct one"
            )
        found = new
    return found


def _schema(
    read: _Reader, key: str, rope: Any, theta: float, max_length: int
) -> tuple[float, RopeScaling]:
    if not isinstance(rope, dict):
        raise read.error(key, f"is {_short(rope)}, which is no JSON object")
    kinds = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    if not kinds and rope and key == "rope_scaling":
        raise read.error(key, "has no rope_type")
    if kinds and (not isinstance(kinds[0], str) or kinds[-1] != kinds[0]):
        raise read.error(key, f"has rope_type {' and '.join(map(_short, kinds))}")
    kind = kinds[0] if kinds else "default"
    known = {
        "default": (),
        "linear": ("factor", _ORIGINAL),  # the latter has no effect
        "dynamic": ("factor", _ORIGINAL),
        "yarn": (*_YARN, *_MSCALES),
        "llama3": tuple(_LLAMA3),
    }.get(kind)
    if known is None:
        raise read.error(key, f"is of type {kind!r}; what can be read is {', '.join(_READ)}")
    inside = _Reader({f"{key}.{name}": value for name, value in rope.items()}, read.where)
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


def _factor(inside: _Reader, key: str) -> float:
    factor = inside.number(f"{key}.factor")
    if factor < 1:
        raise inside.error(f"{key}.factor", f"is {factor:g}; a scaling's factor is 1 or above")
    return factor


def _check_original(read: _Reader, key: str, original: int) -> None:
    if read.config.get(_ORIGINAL, original) != original:
        # transformers 5 takes this one, 4 the one inside.
        raise read.error(_ORIGINAL, f"differs from that in {key}; correct one")


def _yarn(read: _Reader, inside: _Reader, key: str, max_length: int) -> YarnRopeScaling:
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


def _scaling(rope: RopeScaling) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """rope_scaling, and rope_parameters without rope_theta."""
    match rope:
        case NoRopeScaling():
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
        f" {', '.join(_READ)}"
    )
