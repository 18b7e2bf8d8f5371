"""One table: our kinds of RoPE, and how the config files of other formats express each of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jllama.config import (
    AdaptiveRopeScaling,
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    NoRopeScaling,
    NtkRopeScaling,
    YarnRopeScaling,
)

ORIGINAL = "original_max_position_embeddings"  # Hugging Face's name of `original_length`


@dataclasses.dataclass(frozen=True)
class RopeFormat:
    """How other formats express one kind of RoPE.

    Attributes:
      scaling: our class.
      hf: rope_type in config.json; None where Hugging Face's LLaMA has no such kind.
      hf_keys: the keys of its numbers there; all but ORIGINAL are called as our fields.
      hf_ignored: keys that transformers accepts beside them and that change nothing.
      hf_type: the key of the kind in rope_scaling. transformers before 4.43 wants "type" and
        "factor", and no others.
      gguf: llama.rope.scaling.type; "" where other keys say it all, None where llama.cpp has no
        such kind.
      gguf_keys: the keys of its numbers, after llama.rope.scaling, by our fields.
      gguf_fixed: the values of our fields that llama.cpp has in its code, and reads from no file.
      gguf_tensor: the file has a tensor with the factor of each frequency.
      meta: use_scaled_rope in params.json; None where Meta published no such model.
    """

    scaling: type
    hf: str | None = None
    hf_keys: tuple[str, ...] = ()
    hf_ignored: tuple[str, ...] = ()
    hf_type: str = "rope_type"
    gguf: str | None = None
    gguf_keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf_fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gguf_tensor: bool = False
    meta: bool | None = None


ROPE_FORMATS = {
    "none": RopeFormat(NoRopeScaling, hf="default", gguf="", meta=False),
    "linear": RopeFormat(
        LinearRopeScaling,
        hf="linear",
        hf_keys=("factor",),
        hf_ignored=(ORIGINAL,),
        hf_type="type",
        gguf="linear",
        gguf_keys={"factor": "factor"},
    ),
    "ntk": RopeFormat(NtkRopeScaling, hf="default", gguf=""),  # written as the theta that it is
    "dynamic": RopeFormat(
        DynamicRopeScaling,
        hf="dynamic",
        hf_keys=("factor",),
        hf_ignored=(ORIGINAL,),
        hf_type="type",
    ),
    "adaptive": RopeFormat(AdaptiveRopeScaling),
    "yarn": RopeFormat(
        YarnRopeScaling,
        hf="yarn",
        hf_keys=(
            "factor", "beta_fast", "beta_slow", ORIGINAL, "attention_factor", "truncate",
        ),
        hf_ignored=("mscale", "mscale_all_dim", "finetuned"),
        gguf="yarn",
        gguf_keys={
            "factor": "factor",
            "original_length": "original_context_length",
            "attention_factor": "attn_factor",
        },
        # GGUF has keys for these, which llama.cpp does not read for the architecture "llama".
        gguf_fixed={"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
    ),
    "llama3": RopeFormat(
        Llama3RopeScaling,
        hf="llama3",
        hf_keys=("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
        gguf="",
        gguf_tensor=True,
        meta=True,
    ),
}  # fmt: skip
