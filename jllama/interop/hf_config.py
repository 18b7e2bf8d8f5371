"""Hugging Face's config.json and `ModelConfig`: each from the other.

What a file leaves out has the value that transformers gives it: the defaults are those of
`LlamaConfig` in transformers 4.57.6 and 5.23.0, which agree. What changes the function in either
and the model here cannot express is an error; keys that neither reads under this model type are
left alone.
"""

from collections.abc import Mapping
from typing import Any

from jllama.config import DynamicRopeScaling, ModelConfig, TruncatedNormalInit
from jllama.errors import UserError
from jllama.interop.hf_rope import AFTER, read_rope, write_rope
from jllama.interop.hf_values import Reader, short
from jllama.model.rope import effective_theta
from jllama.text.tokenizer import Tokenizer

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
_QUANTISED = {"quantization_config", "compression_config"}


def read_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that a parsed config.json describes; `init` is the default one.

    Raises UserError, naming `where` and the key, for what is missing, wrong or not expressible.
    """
    read = Reader(config, where)
    kind = config.get("model_type")
    if kind != "llama":
        said = "is missing" if kind is None else f"is {kind!r}"
        raise read.error("model_type", f"{said}; only 'llama' can be read")
    for key, neutral in _NEUTRAL.items():
        if key in config and config[key] not in neutral:
            hint = "; take the weights before quantisation" * (key in _QUANTISED)
            said = f"is {short(config[key])}, which this model cannot express{hint}"
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
    theta, rope, max_length = read_rope(read, head_dim)
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
    (rope_parameters); static NTK is a larger rope_theta. Of dynamic scaling,
    max_position_embeddings is the length before it. Raises UserError for a model that is no LLaMA
    of Hugging Face's.
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
    scaling, parameters = write_rope(config.rope)
    theta = effective_theta(config)
    dynamic = isinstance(config.rope, DynamicRopeScaling)
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
        "max_position_embeddings": config.rope.original_length if dynamic else config.max_length,
        **({AFTER: config.max_length} if dynamic else {}),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {**parameters, "rope_theta": theta},
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
