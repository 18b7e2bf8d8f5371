"""A model that is small, has every size different, and no parameter at a special value.

And a small tokenizer of a kind that is common.
"""

import io
from collections.abc import Iterable

import jax
import numpy as np
import sentencepiece

from jllama.config import (
    AdaptiveRopeScaling,
    ComputeConfig,
    DynamicRopeScaling,
    FanInInit,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    NoRopeScaling,
    NtkRopeScaling,
    TruncatedNormalInit,
    YarnRopeScaling,
)
from jllama.model import llama

LINEAR = LinearRopeScaling(kind="linear", factor=4.0)
LLAMA3 = Llama3RopeScaling(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=256
)
NTK = NtkRopeScaling(kind="ntk", alpha=4.0)
YARN = YarnRopeScaling(kind="yarn", factor=8.0, original_length=256)
DYNAMIC = DynamicRopeScaling(kind="dynamic", factor=3.0, original_length=16)
# Chinese-LLaMA's rules: version 1, and version 2 after position interpolation.
ADAPTIVE1 = AdaptiveRopeScaling(kind="adaptive", original_length=16, coefficient=1.1)
ADAPTIVE2 = AdaptiveRopeScaling(kind="adaptive", original_length=16, factor=4.0)
FAN_IN = FanInInit(kind="fan_in", embedding_std=0.02, scale_residual=False)

# What each published model does differently, at a tiny size.
VARIANTS = {
    "llama1": {"rms_norm_eps": 1e-6},
    "llama2-70b": {"num_kv_heads": 2},
    "llama3": {"num_kv_heads": 2, "rope_theta": 5e5},
    "llama3.1": {"num_kv_heads": 2, "rope_theta": 5e5, "rope": LLAMA3},
    "llama3.2": {"num_kv_heads": 1, "rope_theta": 5e5, "rope": LLAMA3, "tie_embeddings": True},
    "codellama": {"rope_theta": 1e6},
    "linear-rope": {"rope": LINEAR},
    "ntk": {"rope": NTK},
    "dynamic": {"rope": DYNAMIC},
    "adaptive-1": {"rope": ADAPTIVE1},
    "adaptive-2": {"rope": ADAPTIVE2},
    "yarn": {"rope": YARN},
    "tied": {"tie_embeddings": True},
    "qk-norm": {"qk_norm": True, "num_kv_heads": 2},
    "fan-in": {"init": FAN_IN},
}


def config(**changes) -> ModelConfig:
    """Four query heads of width 16 over a model width of 48, unless changed."""
    sizes = {
        "vocab_size": 97,
        "hidden_dim": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 16,
        "ffn_dim": 80,
        "max_length": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "rope": NoRopeScaling(kind="none"),
        "tie_embeddings": False,
        "init": TruncatedNormalInit(kind="truncated_normal", std=0.02, scale_residual=True),
    }
    return ModelConfig(**{**sizes, **changes})


def compute(dtype: str = "float32", **changes) -> ComputeConfig:
    return ComputeConfig(dtype=dtype, **changes)


def params(model: ModelConfig, scale: float = 1.0, seed: int = 0) -> llama.Params:
    """Fresh parameters; matrices times `scale`, and norm scales around one instead of at one."""
    key = jax.random.key(seed)
    fresh = jax.jit(llama.init_params, static_argnums=(0, 1))(model, compute(), key)
    leaves, tree = jax.tree.flatten_with_path(fresh)
    out = []
    for i, (path, leaf) in enumerate(leaves):
        noise = jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
        out.append(leaf + 0.1 * noise if path[-1].key == "scale" else leaf * scale)
    return tree.unflatten(out)


def tokens(*shape: int, vocab_size: int = 97, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


def logits(
    params, model, tokens, positions=None, segments=None, cpt=None, turns=None
) -> np.ndarray:
    """Logits of whole rows, [B,T,V]."""
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    run = jax.jit(_logits, static_argnums=(1, 2))
    return np.asarray(run(params, model, cpt or compute(), tokens, positions, segments, turns))


def _logits(params, model, compute, tokens, positions, segments, turns):
    hidden, _ = llama.apply(params, model, compute, tokens, positions, segments, turns=turns)
    return llama.logits(params, model, hidden)


def relative_error(got, wanted) -> float:
    """The largest difference over the largest value."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def llama2_c_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> bytes:
    """A SentencePiece model trained with the settings of llama2.c, as stories260K's was.

    They leave the normaliser at SentencePiece's default, which removes extra spaces.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        unk_surface=" \u2047 ",
        normalization_rule_name="identity",
        minloglevel=3,
    )
    return model.getvalue()
