"""Hugging Face's config.json and `ModelConfig`: each from the other.

A key that a file leaves out has the default of `LlamaConfig`, in which transformers 4.57.6 and
5.23.0 agree. A key that changes the function in either, in a way that `ModelConfig` cannot express,
is an error. Keys that have no effect here are listed, and a line on stderr names all others. RoPE's
keys are in `jllama.interop.hf_rope`; the table of keys for users is in docs/interop.md.
"""

import dataclasses
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
from jllama.progress import note
from jllama.text.tokenizer import Tokenizer

# Keys that change the forward pass, with the values at which they do not.
_NEUTRAL: dict[str, tuple] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "partial_rotary_factor": (1, None),
    "pruned_heads": (None, {}),
    "is_encoder_decoder": (False, None),
    "is_causal": (True, None),
    "sliding_window": (None,),
    "attention_chunk_size": (None,),
    "num_kv_shared_layers": (None,),
    "kv_sharing_modes": (None,),
    "per_layer_config": (None,),
}
_REMEDY = "LLaMA has none; if the model was trained without it, take the key out"
_REMEDIES = {
    "attention_bias": "if the files have no tensors named bias, write false",
    "mlp_bias": "if the files have no tensors named bias, write false",
    "hidden_act": 'if the model was trained with SwiGLU, write "silu"',
    "sliding_window": "if the model attends to the whole text, set use_sliding_window to false",
}
# Keys without effect here: names, versions, training, memory, what other programs and other models
# read, and sampling, whose settings are arguments of `generate`.
_NO_EFFECT = {
    "_attn_implementation", "_name_or_path", "add_cross_attention", "architectures",
    "attention_dropout", "attn_implementation", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
    "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length",
    "max_window_layers", "min_length", "neftune_noise_alpha", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache", "use_sliding_window",
}  # fmt: skip
# Keys that other modules read: RoPE and the length, quantised weights, the ids that end a text.
_READ_ELSEWHERE = {
    "auto_map", "eos_token_id",
    "max_position_embeddings", "max_sequence_length", "original_max_position_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "quantization_config", "compression_config",
}  # fmt: skip
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
    theta, rope, max_length = read_rope(config, where)
    window = config.get("sliding_window")
    if config.get("use_sliding_window") is False or (type(window) is int and window >= max_length):
        config = {key: value for key, value in config.items() if key != "sliding_window"}
    check_neutral(config, where, _NEUTRAL, _REMEDIES, _REMEDY)
    if config.get("auto_map"):
        note(f"{where}: the code that auto_map names is not run; this is read as LLaMA")
    known = {field.name for field in dataclasses.fields(_HfConfig)} | _NEUTRAL.keys()
    unknown = config.keys() - known - _READ_ELSEWHERE - _NO_EFFECT
    if unknown := sorted(key for key in unknown if config[key]):
        note(f"{where}: keys that are unknown here have no effect: {', '.join(unknown)}")
    if file.head_dim is None and file.hidden_size % file.num_attention_heads:
        raise UserError(
            f"{where}: hidden_size is {file.hidden_size}, no multiple of"
            f" num_attention_heads={file.num_attention_heads}, and head_dim is missing"
        )
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
