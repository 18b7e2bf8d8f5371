"""Hugging Face's config.json and `ModelConfig`: each from the other.

A key that a file leaves out has the default of `LlamaConfig`, in which transformers 4.57.6 and
5.23.0 agree. A key that changes the function in either, in a way that `ModelConfig` cannot express,
is an error; keys that neither reads for this model type are left alone. RoPE's keys are in
`jllama.interop.hf_rope`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from jllama.config import ModelConfig, TruncatedNormalInit
from jllama.errors import UserError
from jllama.interop.hf_rope import read_rope, write_rope
from jllama.interop.json_config import (
    Positive,
    Size,
    check,
    check_neutral,
    explained,
    json_dataclass,
)
from jllama.text.tokenizer import Tokenizer

# Keys that change the forward pass, with the values at which they do not.
_NEUTRAL: dict[str, tuple] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None, {}),  # names code in the folder
    "pruned_heads": (None, {}),
    "is_encoder_decoder": (False, None),
    "is_causal": (True, None),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "num_kv_shared_layers": (None,),
    "kv_sharing_modes": (None,),
    "per_layer_config": (None,),
}
_REMEDIES = dict.fromkeys(
    ("quantization_config", "compression_config"), "take the weights before quantisation"
)
# The file's key of each field of `ModelConfig` that both have.
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# What `ModelConfig` calls RoPE's keys in its errors.
_ROPE_KEYS = {
    "max_length": "max_position_embeddings",
    "rope.original_length": "original_max_position_embeddings",
    "rope.factor": "factor",
    "rope.kind": "rope_type",
}


@json_dataclass
class _HfConfig:
    """The keys of config.json that decide the architecture, but for RoPE's."""

    model_type: Literal["llama"]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False
    layer_types: tuple[Literal["full_attention"], ...] | None = None


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that a parsed config.json describes, with the default `init`.

    Raises UserError, which names the file `where` and the key, for what is missing, wrong or not
    expressible.
    """
    file = check(_HfConfig, config, where)
    check_neutral(config, where, _NEUTRAL, _REMEDIES)
    if file.head_dim is None and file.hidden_size % file.num_attention_heads:
        raise UserError(
            f"{where}: hidden_size is {file.hidden_size}, no multiple of"
            f" num_attention_heads={file.num_attention_heads}, and head_dim is missing"
        )
    theta, rope, max_length = read_rope(config, where)
    values = {field: getattr(file, key) for field, key in _KEYS.items()} | {
        "num_kv_heads": file.num_key_value_heads or file.num_attention_heads,
        "head_dim": file.head_dim or file.hidden_size // file.num_attention_heads,
    }
    try:
        return ModelConfig(**values, rope_theta=theta, rope=rope, max_length=max_length)
    except pydantic.ValidationError as e:
        raise explained(e, where, _KEYS | _ROPE_KEYS, values) from None


def write_config(config: ModelConfig, dtype: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The keys of config.json, for transformers from 4.31 on; `dtype` is that of the tensors.

    Raises UserError for a model that Hugging Face's LLaMA cannot express.
    """
    if config.qk_norm:
        raise UserError("qk_norm: Hugging Face's LLaMA has none; this model cannot be written")
    if config.hidden_dim % config.num_heads:
        raise UserError(
            f"hidden_dim={config.hidden_dim}: no multiple of num_heads={config.num_heads}, which"
            " transformers 5 asks for; this model cannot be written"
        )
    init = config.init
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, field) for field, key in _KEYS.items()},
        **write_rope(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": (
            init.std if isinstance(init, TruncatedNormalInit) else init.embedding_std
        ),
        "use_cache": True,
        "pretraining_tp": 1,
        # If these were left out, they would be 1 and 2.
        **(_ends(tokenizer) if tokenizer else {"bos_token_id": None, "eos_token_id": None}),
        # Without a version, 4.57 takes Llama 3's tokenizer for a broken one of Mistral's.
        "transformers_version": "4.43.0",
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def generation_config(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The keys of generation_config.json: the ids that begin and end a text, none for sampling."""
    return _ends(tokenizer) if tokenizer else {}


def _ends(tokenizer: Tokenizer) -> dict[str, Any]:
    stop = sorted(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop if len(stop) > 1 else tokenizer.eos_id,
    }
