"""GGUF, the one-file format of llama.cpp: a model with its tokenizer.

Metadata and names are those of llama.cpp's own converter for its architecture "llama". Tensors are
converted one at a time: the host holds the largest of them, never the model.
"""

import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType
from tqdm import tqdm

from jllama import storage
from jllama.config import (
    ComputeConfig,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    NoRopeScaling,
)
from jllama.errors import UserError
from jllama.flops import parameter_count
from jllama.interop.gguf_vocabulary import vocabulary_of
from jllama.interop.names import Name, file_shape, name_of, to_file
from jllama.model.llama import Params, param_specs
from jllama.model.rope import inverse_frequencies
from jllama.text.interface import Tokenizer

# kind: (matrices, embedding and head, general.file_type). Below eight bits the two tables keep
# eight: they are few of the bits of a large model, and every token goes through both of them.
_KINDS = {
    "F32": (Type.F32, Type.F32, FileType.ALL_F32),
    "F16": (Type.F16, Type.F16, FileType.MOSTLY_F16),
    "BF16": (Type.BF16, Type.BF16, FileType.MOSTLY_BF16),
    "Q8_0": (Type.Q8_0, Type.Q8_0, FileType.MOSTLY_Q8_0),
    "Q5_1": (Type.Q5_1, Type.Q8_0, FileType.MOSTLY_Q5_1),
    "Q5_0": (Type.Q5_0, Type.Q8_0, FileType.MOSTLY_Q5_0),
    "Q4_1": (Type.Q4_1, Type.Q8_0, FileType.MOSTLY_Q4_1),
    "Q4_0": (Type.Q4_0, Type.Q8_0, FileType.MOSTLY_Q4_0),
    "MXFP4": (Type.MXFP4, Type.Q8_0, FileType.MOSTLY_MXFP4_MOE),
}
KINDS = tuple(_KINDS)
_TABLES = {"embedding.weight", "head.weight"}
# The largest weight that a type can hold; blocks keep a scale or a minimum in float16.
_LARGEST = {
    Type.F32: float(np.finfo(np.float32).max),
    Type.BF16: 3.3895313892515355e38,
    Type.MXFP4: 3.3895313892515355e38,
}
_LARGEST_F16 = 65504.0
# Blocks of smaller weights than this are zeros: the library divides by their scale, which is none.
_SMALLEST_IN_BLOCKS = 2.0**-100


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: `layer` of the parameter that `name` names, or all of it."""

    name: Name
    layer: int
    inputs: int
    shape: tuple[int, ...]
    type: Type

    @property
    def key(self) -> str:
        return self.name.of("gguf", self.layer)

    @property
    def where(self) -> str:
        layer = f" of layer {self.layer}" if self.name.stacked else ""
        return f"{self.name.path}{layer} ({self.key})"

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block * size

    def values(self, leaf: Any) -> np.ndarray:
        """The tensor's values, as the file has them laid out, float32."""
        array = np.asarray(leaf[self.layer] if self.name.stacked else leaf)
        array = to_file(array, self.inputs, interleaved=self.name.rotary)
        return np.ascontiguousarray(array, np.float32)

    def quantized(self, values: np.ndarray) -> np.ndarray:
        """`values` as the type stores them; UserError if it cannot."""
        largest = float(np.abs(values).max())
        if not np.isfinite(largest):
            raise UserError(f"{self.where}: holds NaN or infinity; nothing written")
        if largest > (limit := _LARGEST.get(self.type, _LARGEST_F16)):
            raise UserError(
                f"{self.where}: a weight of {largest:.6g} is above {limit:.6g}, the largest of"
                f" {self.type.name}; export BF16 or F32"
            )
        if gguf.GGML_QUANT_SIZES[self.type][0] > 1:
            values = np.where(np.abs(values) < _SMALLEST_IN_BLOCKS, np.float32(0), values)
        return gguf.quantize(values, self.type)


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    kind: str,
    name: str,
    progress: bool = False,
) -> None:
    """Writes a model and its tokenizer as one GGUF file, whole or not at all.

    Args:
      path: of the new file, local or a URL.
      params: the tree of `jllama.model.llama`, of any float type and sharding.
      tokenizer: one of `jllama.text`; llama.cpp loads no model without one.
      kind: one of `KINDS`. Norms are F32 in all of them, and a tensor whose rows do not divide into
        the kind's blocks is F16, which is said on stderr.
      name: the model's, for people.
      progress: show a bar with bytes on stderr, where that is a terminal.

    Raises:
      UserError: before anything is written if the file exists, the kind is another, or the model
        or tokenizer cannot be said in GGUF; later if a weight is not finite or does not fit.
      StorageError: if the disk is full or the storage fails. Nothing is left then either.
    """
    path = storage.path(path)
    kind = _checked_kind(kind)
    if storage.exists(path):
        raise UserError(f"{path}: exists already; remove it or give another name")
    tensors = list(_tensors(config, kind))
    writer = gguf.GGUFWriter(None, "llama")
    _add_metadata(writer, config, kind, name)
    vocabulary_of(tokenizer, config.vocab_size).add_to(writer)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for t in tensors:
        writer.add_tensor_info(t.key, t.shape, np.dtype(np.float32), t.nbytes, raw_dtype=t.type)

    leaves = {_dotted(p): leaf for p, leaf in jax.tree.leaves_with_path(params)}
    remote = storage.is_remote(path)
    bar = tqdm(
        desc=f"write {path.name}",
        total=sum(t.nbytes for t in tensors),
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    )
    with (
        storage.writing(path),
        tempfile.TemporaryDirectory(
            prefix=f".{path.name}-", dir=None if remote else path.parent
        ) as folder,
        bar,
    ):
        part = Path(folder) / path.name
        try:
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            for t in tensors:
                writer.write_tensor_data(t.quantized(t.values(leaves[t.name.path])))
                bar.update(t.nbytes)
        finally:
            writer.close()
        if remote:
            storage.upload(part, path)
            return
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)


def _checked_kind(kind: str) -> str:
    kind = kind.upper()
    if kind in KINDS:
        return kind
    if re.match(r"(I?Q|TQ)\d", kind):
        raise UserError(
            f"{kind}: is made by llama.cpp's own tool; export F16, then"
            f" llama-quantize MODEL-F16.gguf MODEL-{kind}.gguf {kind}"
        )
    raise UserError(f"{kind}: no such kind of GGUF; give one of {', '.join(KINDS)}")


def _dotted(path: tuple) -> str:
    return ".".join(entry.key for entry in path)


def _tensors(config: ModelConfig, kind: str) -> Iterator[_Tensor]:
    """The file's tensors. UserError for a parameter that GGUF's llama does not have."""
    matrix, table, _ = _KINDS[kind]
    specs = param_specs(config, ComputeConfig(dtype="float32"))
    for path, spec in jax.tree.leaves_with_path(specs):
        name = name_of(_dotted(path))
        shape = file_shape(spec.shape[1:] if name.stacked else spec.shape, spec.inputs)
        if len(shape) == 1:
            type = Type.F32
        else:
            type = _fitting(table if name.path in _TABLES else matrix, name.path, shape)
        for layer in range(config.num_layers if name.stacked else 1):
            yield _Tensor(name, layer, spec.inputs, shape, type)


def _fitting(type: Type, path: str, shape: tuple[int, ...]) -> Type:
    block, _ = gguf.GGML_QUANT_SIZES[type]
    if shape[-1] % block == 0:
        return type
    print(
        f"{path}: written as F16: {type.name} has blocks of {block}, which do not divide"
        f" rows of {shape[-1]}",
        file=sys.stderr,
    )
    return Type.F16


def _add_metadata(writer: gguf.GGUFWriter, config: ModelConfig, kind: str, name: str) -> None:
    count = parameter_count(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(count, count, 0, 0))
    writer.add_file_type(_KINDS[kind][2])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if isinstance(config.rope, LinearRopeScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """What llama.cpp divides each frequency by, [head_dim/2] float32: how it is told of llama3."""
    if not isinstance(config.rope, Llama3RopeScaling):
        return None
    unscaled = dataclasses.replace(config, rope=NoRopeScaling(kind="none"))
    return (inverse_frequencies(unscaled) / inverse_frequencies(config)).astype(np.float32)
