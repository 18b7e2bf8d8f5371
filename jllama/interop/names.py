"""One table: the path of each parameter, and its name and layout in every other format.

Files hold one matrix per layer, [outputs, inputs]. This package stacks the layers, and a matrix is
[inputs..., outputs...], where heads are an axis. In a query or key head, Meta and GGUF turn the
pair (2i, 2i+1) by RoPE, Hugging Face and this package (i, i + N/2), so the order of rows differs.
N is the head's width.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from jllama.errors import UserError

FileFormat = Literal["hf", "meta", "gguf"]
# The file by which a folder is known: a model of Hugging Face's or Meta's, an adapter of PEFT's.
HF_CONFIG, META_PARAMS, PEFT_CONFIG = "config.json", "params.json", "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class Name:
    """A parameter's names; `{}` stands for the layer's number.

    Attributes:
      path: our dotted path.
      hf, meta, gguf: the names in files.
      rotary: whether the rows are queries or keys, which RoPE turns in pairs.
      split: the axis of the file's matrix along which Meta's model parallelism cuts it; None where
        every shard has it whole. A table may be cut along either axis, and its shape tells which.
    """

    path: str
    hf: str
    meta: str
    gguf: str
    split: int | None
    rotary: bool = False

    @property
    def stacked(self) -> bool:
        """Whether files have one tensor per layer."""
        return "{}" in self.hf

    def of(self, format: FileFormat, layer: int = 0) -> str:
        """The name of `layer`'s tensor in a file."""
        return getattr(self, format).format(layer)


_HF, _META, _GGUF = "model.layers.{}.", "layers.{}.", "blk.{}."


def _in_layer(path, hf, meta, gguf, split, rotary=False):
    return Name(
        f"layers.{path}",
        f"{_HF}{hf}.weight",
        f"{_META}{meta}.weight",
        f"{_GGUF}{gguf}.weight",
        split,
        rotary,
    )


NAMES = (
    Name(
        "embedding.weight",
        "model.embed_tokens.weight",
        "tok_embeddings.weight",
        "token_embd.weight",
        0,
    ),
    _in_layer(
        "attention_norm.scale", "input_layernorm", "attention_norm", "attn_norm", None
    ),
    _in_layer("attention.q.kernel", "self_attn.q_proj", "attention.wq", "attn_q", 0, rotary=True),
    _in_layer("attention.k.kernel", "self_attn.k_proj", "attention.wk", "attn_k", 0, rotary=True),
    _in_layer("attention.v.kernel", "self_attn.v_proj", "attention.wv", "attn_v", 0),
    _in_layer("attention.o.kernel", "self_attn.o_proj", "attention.wo", "attn_output", 1),
    _in_layer("ffn_norm.scale", "post_attention_layernorm", "ffn_norm", "ffn_norm", None),
    _in_layer("mlp.gate.kernel", "mlp.gate_proj", "feed_forward.w1", "ffn_gate", 0),
    _in_layer("mlp.down.kernel", "mlp.down_proj", "feed_forward.w2", "ffn_down", 1),
    _in_layer("mlp.up.kernel", "mlp.up_proj", "feed_forward.w3", "ffn_up", 0),
    Name("final_norm.scale", "model.norm.weight", "norm.weight", "output_norm.weight", None),
    Name("head.weight", "lm_head.weight", "output.weight", "output.weight", 0),
)  # fmt: skip
_BY_PATH = {name.path: name for name in NAMES}


def name_of(path: str) -> Name:
    """The names of the parameter at `path`; UserError if other formats do not have it."""
    if path not in _BY_PATH:
        raise UserError(f"{path}: has no name in other formats, whose LLaMA lacks this parameter")
    return _BY_PATH[path]


def file_shape(shape: Sequence[int], inputs: int) -> tuple[int, ...]:
    """The shape in a file of one layer's parameter, which is `shape` in this package.

    `inputs` is the field of `jllama.model.llama.ParamSpec`: the number of input axes, 0 for tables
    and scales, whose layout is the same in files.
    """
    if not inputs:
        return tuple(shape)
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])
