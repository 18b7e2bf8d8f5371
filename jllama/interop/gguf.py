"""Writes GGUF, llama.cpp's format: a model and its tokenizer in one file.

Metadata and names are those of llama.cpp's own converter for its architecture "llama". Beside the
parameters, the host holds one tensor at a time.
"""

import math
import re
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType

from jllama.config import ModelConfig, RopeScaling
from jllama.errors import UserError
from jllama.files import outputs
from jllama.flops import parameter_count
from jllama.interop.gguf_vocabulary import vocabulary_of
from jllama.interop.names import name_of
from jllama.interop.parameters import file_specs, file_tensors
from jllama.interop.rope_formats import ROPE_FORMATS
from jllama.model.llama import Params
from jllama.model.rope import effective_theta, inverse_frequencies
from jllama.progress import Progress, say
from jllama.text.tokenizer import Tokenizer

# The types of each kind: of matrices, of embedding and head, and general.file_type. Where matrices
# have fewer than eight bits, embedding and head keep eight, for every token passes through both;
# llama.cpp gives them more bits, too.
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
_TABLES = {name_of(path).gguf for path in ("embedding.weight", "head.weight")}
_ROPE_FACTORS = "rope_freqs.weight"
# The largest weight that a type holds. Types that are not listed have a float16 in every block.
_LARGEST = {Type.F32: math.inf} | dict.fromkeys((Type.BF16, Type.MXFP4), 3.3895313892515355e38)
_LARGEST_F16 = 65504.0


def write_gguf(
    path: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer | None, kind: str
) -> None:
    """Writes a file that llama.cpp runs, whole or not at all; shows progress in bytes.

    Args:
      path: the file, local or a URL; the model is named after it.
      params: the tree of `jllama.model.llama`, of any float dtype and sharding.
      tokenizer: without one the file has no vocabulary, and llama.cpp is given ids.
      kind: one of `KINDS`. Norms are F32 in every kind. A matrix whose rows do not divide into the
        kind's blocks is F16; a line on stderr says so.

    Raises:
      UserError: the file exists, the kind is none of `KINDS`, GGUF cannot express the model or its
        tokenizer, or a weight is not finite or too large for its type.
      StorageError: the disk is full, or the storage fails.
    """
    kind = kind_of(kind)
    _check_rope(config.rope)
    specs = file_specs(config)
    tensors = file_tensors(params, specs, "gguf", interleaved=True)
    types = {name: _type(kind, name, tensor.shape) for name, tensor in tensors.items()}
    writer = gguf.GGUFWriter(None, "llama")
    _add_metadata(writer, config, kind, path.stem)
    vocabulary_of(tokenizer, config.vocab_size).add_to(writer)
    if tokenizer is not None and "chat_template" in tokenizer.carried:
        writer.add_chat_template(tokenizer.carried["chat_template"])
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(_ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for name, tensor in tensors.items():
        size = _nbytes(types[name], tensor.shape)
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, types[name])

    total = tensor_bytes(config, kind)
    with outputs.new_file(path) as new, Progress(f"write {path.name}", total) as progress:
        if kind != "F16" and (as_f16 := [n for n, type in types.items() if type == Type.F16]):
            say(
                f"{path}: {len(as_f16)} of {len(types)} tensors are F16, because their rows do not"
                f" divide into {kind}'s blocks of 32: {as_f16[0]} and others"
            )
        try:
            writer.write_header_to_file(new)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            for name, tensor in tensors.items():
                data = _quantize(tensor.read().astype(np.float32), types[name], name)
                writer.write_tensor_data(data)
                progress.advance(data.nbytes)
        finally:
            writer.close()


def check_expressible(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raises UserError if GGUF, or llama.cpp, cannot express the model or its tokenizer."""
    file_specs(config)
    _check_rope(config.rope)
    vocabulary_of(tokenizer, config.vocab_size)


def kind_of(name: str) -> str:
    """The kind by its name in upper or lower case; UserError if it is none of `KINDS`."""
    kind = name.upper()
    if kind in KINDS:
        return kind
    if re.match(r"(I?Q|TQ)\d", kind):
        raise UserError(
            f"{kind}: llama.cpp's own tool makes this kind: export F16, then run"
            f" llama-quantize MODEL-F16.gguf MODEL-{kind}.gguf {kind}"
        )
    raise UserError(f"{kind}: there is no such kind of GGUF file; choose one of {', '.join(KINDS)}")


def tensor_bytes(config: ModelConfig, kind: str) -> int:
    """The size in bytes of the tensors in a file."""
    specs = file_specs(config)
    tensors = file_tensors(specs, specs, "gguf", interleaved=True)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return sum(_nbytes(_type(kind, name, shape), shape) for name, shape in shapes.items())


def _type(kind: str, name: str, shape: tuple[int, ...]) -> Type:
    if len(shape) == 1:
        return Type.F32
    matrix, table, _ = _KINDS[kind]
    type = table if name in _TABLES else matrix
    block, _ = gguf.GGML_QUANT_SIZES[type]
    return Type.F16 if shape[-1] % block else type


def _nbytes(type: Type, shape: tuple[int, ...]) -> int:
    block, size = gguf.GGML_QUANT_SIZES[type]
    return math.prod(shape) // block * size


def _quantize(values: np.ndarray, type: Type, name: str) -> np.ndarray:
    """Encodes float32 values as `type`; UserError, with `name`, if it cannot hold them."""
    largest = float(max(values.max(), -values.min()))
    limit = _LARGEST.get(type, _LARGEST_F16)
    if not math.isfinite(largest):
        raise UserError(f"{name}: has weights that are NaN or infinite")
    if largest > limit:
        fits = "F32" if largest > _LARGEST[Type.BF16] else "BF16 or F32"
        raise UserError(f"{name}: {largest:g} does not fit {type.name}; use {fits}")
    with np.errstate(all="ignore"):  # a block of vanishing weights divides by zero, becomes zeros
        return gguf.quantize(values, type)


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
    for key, value in _rope_metadata(config).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)


def _check_rope(rope: RopeScaling) -> None:
    """Raises UserError if llama.cpp does not compute this RoPE."""
    format = ROPE_FORMATS[rope.kind]
    if format.gguf is None:
        raise UserError(
            f"model.rope.kind={rope.kind}: llama.cpp has no RoPE that depends on the length; choose"
            " ntk, whose alpha is that of one length, yarn or linear, in the config of a copy of"
            " the model"
        )
    for field, fixed in format.gguf_fixed.items():
        value = getattr(rope, field)
        if value != fixed:
            raise UserError(
                f"model.rope.{field}={value}: llama.cpp computes {rope.kind} with {fixed} only"
            )


def _rope_metadata(config: ModelConfig) -> dict[str, str | int | float]:
    """The metadata of a GGUF file about RoPE, by key."""
    rope, format = config.rope, ROPE_FORMATS[config.rope.kind]
    metadata = {
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": effective_theta(config),
    }
    if format.gguf:
        metadata["llama.rope.scaling.type"] = format.gguf
    for field, key in format.gguf_keys.items():
        value = getattr(rope, field)
        if field == "attention_factor" and value is not None:
            value /= 0.1 * math.log(rope.factor) + 1  # llama.cpp multiplies it with YaRN's own
        if value is not None:
            metadata[f"llama.rope.scaling.{key}"] = value
    return metadata


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """The divisor of each frequency, [N/2] float32; None if the kind of RoPE needs no tensor.

    N is the head's width.
    """
    if not ROPE_FORMATS[config.rope.kind].gguf_tensor:
        return None
    unscaled = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    return (unscaled / inverse_frequencies(config)).astype(np.float32)
