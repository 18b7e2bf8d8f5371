"""Every configuration dataclass: frozen, hashable, validated by pydantic.

A choice between variants is a sum type with a mandatory `kind`. `jllama.recipe` loads, overrides
and saves them.
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

_PYDANTIC = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
_config = functools.partial(
    pydantic.dataclasses.dataclass, frozen=True, kw_only=True, config=_PYDANTIC
)

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Nonnegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
LARGEST_FACTOR = 1e6  # of a scaling of RoPE: far above it frequencies are no numbers
Stretch = Annotated[float, Field(ge=1, le=LARGEST_FACTOR)]


def _doc(text: str, **kwargs: Any) -> Any:
    return Field(description=text, **kwargs)


def _default(text: str, default: Any, **kwargs: Any) -> Any:
    return Field(default=default, description=text, **kwargs)


# ------------------------------------------------------------------------------------------ model


@_config
class NoRopeScaling:
    """Rotary frequencies as in the RoPE paper (arXiv:2104.09864)."""

    kind: Literal["none"] = _doc("rotary frequencies unscaled")


@_config
class LinearRopeScaling:
    """Position interpolation (arXiv:2306.15595): positions divided by `factor`."""

    kind: Literal["linear"] = _doc("position interpolation")
    factor: Stretch = _doc("positions are divided by this")


@_config
class NtkRopeScaling:
    """Static NTK-aware scaling (bloc97, 2023): theta times alpha^(N/(N-2)), N the head's width.

    The slowest pair turns alpha times slower, the fastest as before.
    """

    kind: Literal["ntk"] = _doc("NTK-aware: a larger rope_theta, whatever the length")
    alpha: Stretch = _doc("the slowest pair turns so many times slower")


@_config
class DynamicRopeScaling:
    """Dynamic NTK (emozilla, 2023): theta times (fL/L0 - (f-1))^(N/(N-2)) for a text of length L.

    L is at least L0, so that shorter texts are not scaled, and that of a request as a whole, prompt
    and new tokens: theta does not change while a text grows.
    """

    kind: Literal["dynamic"] = _doc("NTK-aware by the length of each text")
    factor: Stretch = _doc("f: how fast theta grows with the length")
    original_length: PositiveInt = _doc("L0: positions of the training before scaling")


@_config
class AdaptiveRopeScaling:
    """Chinese-LLaMA's rules: NTK-aware with alpha = coefficient (2L/L0 - 1) above L0 positions.

    Version 1 has L0 = 2048 and coefficient 1.1; version 2 has coefficient 1 and L0 the model's own
    maximum, with the position interpolation that it was trained with inside. L as in `dynamic`.
    """

    kind: Literal["adaptive"] = _doc("Chinese-LLaMA's NTK-aware rules by the length of each text")
    original_length: PositiveInt = _doc("L0: positions of the training, interpolation included")
    coefficient: Stretch = _default("alpha is this times (2L/L0 - 1), above L0", 1.0)
    factor: Stretch = _default("position interpolation inside: positions are divided by this", 1.0)
    growing: bool = _default(
        "generate as Chinese-LLaMA's own code: L is the text until now, over a cache of keys that"
        " are not turned; no forward pass equals it",
        False,
    )


@_config
class YarnRopeScaling:
    """YaRN (arXiv:2309.00071): slow pairs interpolated, fast ones kept, sharper attention."""

    kind: Literal["yarn"] = _doc("YaRN: interpolation by bands")
    factor: Stretch = _doc("slow pairs are divided by this")
    original_length: PositiveInt = _doc("positions of the training before scaling")
    beta_fast: PositiveFloat = _default("pairs of more turns than this in them are kept", 32.0)
    beta_slow: PositiveFloat = _default("pairs of fewer turns than this are divided fully", 1.0)
    attention_factor: PositiveFloat | None = _default(
        "cosine and sine are multiplied by this; null is 0.1 ln(factor) + 1", None
    )
    truncate: bool = _default("the ends of the band between are rounded outwards to pairs", True)

    def __post_init__(self):
        if self.beta_fast <= self.beta_slow:
            raise ValueError("beta_fast must be above beta_slow")


@_config
class Llama3RopeScaling:
    """Llama-3.1's banded scaling: long wavelengths divided by `factor`, short ones kept."""

    kind: Literal["llama3"] = _doc("Llama-3.1's banded scaling")
    factor: Stretch = _doc("long wavelengths are multiplied by this")
    low_freq_factor: PositiveFloat = _doc("wavelengths above original_length/this are scaled fully")
    high_freq_factor: PositiveFloat = _doc("wavelengths below original_length/this are kept")
    original_length: PositiveInt = _doc("positions of the pretraining before scaling")

    def __post_init__(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")


RopeScaling = Annotated[
    NoRopeScaling
    | LinearRopeScaling
    | NtkRopeScaling
    | DynamicRopeScaling
    | AdaptiveRopeScaling
    | YarnRopeScaling
    | Llama3RopeScaling,
    Field(discriminator="kind"),
]


@_config
class TruncatedNormalInit:
    """Normal, cut at two standard deviations; GPT-2's residual scaling if asked for."""

    kind: Literal["truncated_normal"] = _doc("normal, cut at two standard deviations")
    std: PositiveFloat = _doc("standard deviation of every matrix")
    scale_residual: bool = _doc("divide the attention and MLP outputs' std by sqrt(2 num_layers)")


@_config
class FanInInit:
    """Normal with std 1/sqrt(inputs) for matrices; embeddings at `embedding_std`."""

    kind: Literal["fan_in"] = _doc("truncated normal with std 1/sqrt(inputs)")
    embedding_std: PositiveFloat = _doc("standard deviation of embedding and head")
    scale_residual: bool = _doc("divide the attention and MLP outputs' std by sqrt(2 num_layers)")


Init = Annotated[TruncatedNormalInit | FanInInit, Field(discriminator="kind")]


def _check_rope(rope: RopeScaling, max_length: int, head_dim: int, theta: float) -> None:
    if isinstance(rope, NtkRopeScaling | DynamicRopeScaling | AdaptiveRopeScaling) and head_dim < 4:
        raise ValueError(f"rope.kind={rope.kind} needs head_dim of 4 at least, not {head_dim}")
    original = getattr(rope, "original_length", 0)
    if original > max_length and not isinstance(rope, Llama3RopeScaling):
        raise ValueError(
            f"rope.original_length={original} is above max_length={max_length}: it is the length of"
            " the training before scaling, max_length the one after it"
        )
    if isinstance(rope, YarnRopeScaling) and theta <= 1:
        raise ValueError(f"rope.kind=yarn needs a rope_theta above 1, not {theta:g}")
    if isinstance(rope, YarnRopeScaling) and rope.factor * original < max_length:
        raise ValueError(
            f"rope.factor={rope.factor:g} times rope.original_length={original} does not reach"
            f" max_length={max_length}: raise the factor, or correct the original length"
        )


@_config
class ModelConfig:
    """The architecture: everything that decides the function from tokens and parameters to logits.

    Hashable, so that it serves as a static attribute of the modules.
    """

    vocab_size: PositiveInt = _doc("token ids; rows of the embedding and of the head")
    hidden_dim: PositiveInt = _doc("width of the residual stream")
    num_layers: PositiveInt = _doc("transformer blocks")
    num_heads: PositiveInt = _doc("query heads")
    num_kv_heads: PositiveInt = _doc("key/value heads; divides num_heads")
    head_dim: PositiveInt = _doc("width of one head; even")
    ffn_dim: PositiveInt = _doc("inner width of the SwiGLU feed-forward")
    max_length: PositiveInt = _doc("positions the model is trained for")
    rms_norm_eps: PositiveFloat = _doc("epsilon inside RMSNorm's square root")
    rope_theta: PositiveFloat = _doc("base of the rotary frequencies")
    rope: RopeScaling = _doc("scaling of the rotary frequencies")
    tie_embeddings: bool = _doc("the head is the embedding")
    qk_norm: bool = _default("RMSNorm on each query and key head before RoPE", False)
    vocab_multiple: PositiveInt = _default(
        "embedding and head have vocab_size rounded up to a multiple of it as rows, which then"
        " divide over devices; the rows beyond are zeros and no part of the function",
        1,
    )
    init: Init = _default(
        "initialisation",
        TruncatedNormalInit(kind="truncated_normal", std=0.02, scale_residual=True),
    )

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        _check_rope(self.rope, self.max_length, self.head_dim, self.rope_theta)

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head: `vocab_size` and the padding after it."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def unpadded(self) -> "ModelConfig":
        """The same function without padding, as other formats have it."""
        return dataclasses.replace(self, vocab_multiple=1)


# ------------------------------------------------------------------------------- compute and mesh


@_config
class AutoAttention:
    """Splash on TPU, cuDNN on GPU where rows are one segment, blockwise elsewhere."""

    kind: Literal["auto"] = _doc("the best kernel for the platform")
    block: PositiveInt = _default("queries and keys at a time", 512)


@_config
class ReferenceAttention:
    """All scores of a row at once: memory grows with the square of the length."""

    kind: Literal["reference"] = _doc("all scores at once, for tests and comparisons")


@_config
class BlockwiseAttention:
    """XLA, with an online softmax over blocks (arXiv:2205.14135): memory grows with the length."""

    kind: Literal["blockwise"] = _doc("XLA, block by block: any platform, any segments")
    block: PositiveInt = _default("queries and keys at a time", 512)


@_config
class CudnnAttention:
    """cuDNN's flash attention; it knows no segments, so data.document_mask must be off."""

    kind: Literal["cudnn"] = _doc("cuDNN flash attention on NVIDIA GPUs, without segments")


@_config
class SplashAttention:
    """Splash attention, jax's Pallas kernel for TPU, with segments."""

    kind: Literal["splash"] = _doc("Pallas kernel for TPU")
    block: PositiveInt = _default("queries and keys at a time; a multiple of 128", 512)


Attention = Annotated[
    AutoAttention | ReferenceAttention | BlockwiseAttention | CudnnAttention | SplashAttention,
    Field(discriminator="kind"),
]


@_config
class ComputeConfig:
    """How the function is computed; the architecture does not depend on it.

    Norms, softmax, logits, loss and optimizer state are float32 whatever is chosen here.
    """

    dtype: Literal["float32", "bfloat16"] = _doc(
        "activations and matrix multiplications; TPUs and recent GPUs round the factors of float32"
        " products unless JAX_DEFAULT_MATMUL_PRECISION=highest"
    )
    param_dtype: Literal["float32", "bfloat16"] = _default(
        "stored parameters; bfloat16 loses updates below 1/256 of a weight", "float32"
    )
    remat: Literal["none", "dots", "attention", "full", "offload"] = _default(
        "the backward pass recomputes: none = nothing; dots = all but products and attention;"
        " attention = all but attention; full = each block; offload = each block, whose input"
        " waits in the host's memory",
        "none",
    )
    attention: Attention = _default("attention without a cache", AutoAttention(kind="auto"))
    loss_block: PositiveInt = _default(
        "tokens of a device whose logits exist at a time in the loss", 1024
    )
    scan_unroll: PositiveInt = _default(
        "layers per iteration of the layer loop: more compiles longer and may run faster", 1
    )


@_config
class DistributedConfig:
    """Processes of one run. Found by JAX on a TPU pod, under SLURM, Open MPI and Kubernetes."""

    detect: bool = _default("look for a cluster; without one the run is a single process", True)
    coordinator: str = _default("host:port of process 0, to say it by hand; empty is to detect", "")
    num_processes: Count = _default("with coordinator: processes in all", 0)
    process_id: int = _default("with coordinator: which of them this is, from 0", -1)
    heartbeat_seconds: PositiveInt = _default("silence after which a process counts as dead", 100)
    start_seconds: PositiveInt = _default("wait for all processes to come up", 300)


@_config
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what is left."""

    replica: int = _default("data parallel over the data-centre network", 1)
    fsdp: int = _default("data parallel with parameters sharded", -1)
    tensor: int = _default("tensor parallel", 1)
    context: int = _default("context parallel: positions of a row over devices", 1)

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        if any(s == 0 or s < -1 for s in sizes.values()):
            raise ValueError("sizes are at least 1; at most one is -1, which takes what is left")
        rest = [name for name, s in sizes.items() if s == -1]
        if len(rest) > 1:
            raise ValueError(
                f"{' and '.join(rest)} are -1 (fsdp is unless it is set), and at most one is -1,"
                " which takes what is left: set the other"
            )


# A candidate is one or several mesh axes; the first that divides the dimension wins; null, as the
# last candidate, lets the dimension be whole on every device.
MeshAxes = tuple[Literal["replica", "fsdp", "tensor", "context"], ...]
Candidates = tuple[MeshAxes | None, ...]


@_config
class ShardingConfig:
    """Logical axis -> ordered candidates of mesh axes; see `jllama.parallel.sharding`."""

    batch: Candidates = _default("rows of a batch", (("replica", "fsdp"),))
    seq: Candidates = _default("positions inside attention and MLP", (("context",), None))
    block_seq: Candidates = _default(
        "positions between blocks", (("context", "tensor"), ("context",), None)
    )
    act_embed: Candidates = _default("width of an activation", (None,))
    act_heads: Candidates = _default("heads of an activation", (("tensor",), None))
    act_kv_heads: Candidates = _default("key/value heads of an activation", (("tensor",), None))
    act_ffn: Candidates = _default("feed-forward width of an activation", (("tensor",),))
    act_vocab: Candidates = _default("logits of a position", (("tensor",), None))
    layers: Candidates = _default("stacked layers", (None,))
    vocab: Candidates = _default("rows of embedding and head", (("tensor",), None))
    table_embed: Candidates = _default(
        "model width of embedding and head; takes tensor where the vocabulary cannot",
        (("tensor", "fsdp", "context"), ("fsdp", "context"), ("tensor", "fsdp"), ("fsdp",)),
    )
    embed: Candidates = _default("model width of a parameter", (("fsdp", "context"), ("fsdp",)))
    heads: Candidates = _default("query heads of a parameter", (("tensor",),))
    kv_heads: Candidates = _default("key/value heads of a parameter", (("tensor",), None))
    head_dim: Candidates = _default("width of one head", (None,))
    ffn: Candidates = _default("feed-forward width of a parameter", (("tensor",),))
    norm: Candidates = _default("scale of a norm", (None,))
    lora_rank: Candidates = _default("rank of a LoRA overlay, of parameter and activation", (None,))

    def __post_init__(self):
        for field in dataclasses.fields(self):
            candidates = getattr(self, field.name)
            for candidate in candidates:
                if candidate is not None and not candidate:
                    raise ValueError(f"{field.name}: a candidate names no mesh axis; write null")
                if candidate and len(set(candidate)) < len(candidate):
                    raise ValueError(f"{field.name}: {list(candidate)} names a mesh axis twice")
            if None in candidates[:-1]:
                raise ValueError(f"{field.name}: null always fits, so it comes last")


# ------------------------------------------------------------------------------------------- data


@_config
class StdlibSource:
    """The running interpreter's Python standard library, without tests: one document a file."""

    kind: Literal["stdlib"] = _doc("the running interpreter's own standard library")
    split: Literal["train", "held_out"] = _doc("which part, by a hash of the relative path")
    held_out_one_in: Annotated[int, Field(ge=2)] = _default("one file in so many is held out", 25)
    max_characters: Count = _default(
        "cut files between lines into documents of at most so many characters; 0 is whole files", 0
    )


@_config
class TfdsSource:
    """A TensorFlow Datasets dataset stored as array_record; TensorFlow is not needed."""

    kind: Literal["tfds"] = _doc("a TensorFlow Datasets dataset in array_record format")
    name: str = _doc("name/config:version, or the folder of a prepared dataset")
    split: str = _doc("split or slice, such as train or train[:95%]")
    field: str = _default("feature that holds the text", "text")
    data_dir: str | None = _default("where datasets are stored; null is TFDS's default", None)


@_config
class TextSource:
    """Plain UTF-8 text files, .gz and .zst too."""

    kind: Literal["text"] = _doc("plain UTF-8 files, .gz and .zst too")
    files: tuple[str, ...] = _doc("paths or globs, read in sorted order")
    separator: str | None = _default(
        "text between two documents; null makes a file one document", None
    )


@_config
class JsonlSource:
    """One JSON object a line, .gz and .zst too."""

    kind: Literal["jsonl"] = _doc("one JSON object a line, .gz and .zst too")
    files: tuple[str, ...] = _doc("paths or globs, read in sorted order")
    field: str = _default("key that holds the text", "text")


@_config
class ParquetSource:
    """Parquet files with a string column."""

    kind: Literal["parquet"] = _doc("Parquet files")
    files: tuple[str, ...] = _doc("paths or globs, read in sorted order")
    field: str = _default("column that holds the text", "text")


Source = Annotated[
    StdlibSource | TfdsSource | TextSource | JsonlSource | ParquetSource,
    Field(discriminator="kind"),
]


@_config
class SourceConfig:
    """A named source and its share of the mixture."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = _doc("short name, for reports")
    weight: PositiveFloat = _default("share of the rows; shares are normalised", 1.0)
    source: Source = _doc("where the documents come from")


@_config
class CutPacking:
    """Rows cut from the stream of documents: a document continues in the next row."""

    kind: Literal["cut"] = _doc("documents continue in the next row; no padding")


@_config
class WholePacking:
    """Whole documents, several to a row by best fit; the rest of a row is padding."""

    kind: Literal["whole"] = _doc("documents are never cut; best fit by length")
    too_long: Literal["error", "skip"] = _default("documents longer than a row", "error")


Packing = Annotated[CutPacking | WholePacking, Field(discriminator="kind")]


@_config
class CausalObjective:
    """Documents as they are."""

    kind: Literal["causal"] = _doc("each document from its beginning to its end")


@_config
class InfillObjective:
    """Code Llama's infilling (arXiv:2308.12950): middles come last, cut anew each epoch.

    Documents that a row holds whole are cut in three at two random characters; others stay as
    they are. The tokenizer needs the infill tokens.
    """

    kind: Literal["infill"] = _doc("the middle of a document after what surrounds it")
    rate: Fraction = _default("share of the documents that are cut", 0.9)
    spm: Fraction = _default("share of these that are suffix-prefix-middle, not PSM", 0.5)


@_config
class ReplyObjective:
    """Instruction tuning: of a document the reply is predicted, and the prompt before it is not.

    Prompt and reply are encoded apart, as when a model replies. A document that a row does not hold
    whole, or without the marker, is predicted as it is.
    """

    kind: Literal["reply"] = _doc("prompts and replies, of which replies are predicted")
    after: str = _default(
        "the prompt ends with this, where it first appears", "### Response:", min_length=1
    )


Objective = Annotated[
    CausalObjective | InfillObjective | ReplyObjective, Field(discriminator="kind")
]


@_config
class PrepareConfig:
    """How text becomes tokens on disk, once per source and tokenizer."""

    folder: str = _default("where prepared datasets are kept", "prepared")
    shards: PositiveInt = _default("array_record files per dataset", 4)
    block_tokens: PositiveInt = _default("tokens per record", 4096)
    workers: Count = _default("processes that tokenise; 0 is one per core", 0)
    cache: str = _default(
        "local folder for copies of shards whose folder is a URL; empty reads gs:// in place and"
        " s3:// not at all",
        "",
    )
    max_skipped: Count = _default("bad documents that may be skipped; one more is an error", 0)


@_config
class DataConfig:
    """Where rows come from and how they are cut."""

    length: PositiveInt = _doc("predicted tokens per row")
    packing: Packing = _doc("how documents fill rows")
    objective: Objective = _default(
        "what training rows teach; held-out rows are causal", CausalObjective(kind="causal")
    )
    document_mask: bool = _default(
        "attention and positions stay within a document; false: within the row, as LLaMA 1 and 2",
        True,
    )
    train: tuple[SourceConfig, ...] = _doc("training sources", min_length=1)
    held_out: tuple[SourceConfig, ...] = _default("sources for evaluation", ())
    prepare: PrepareConfig = _default("tokenisation on disk", PrepareConfig())
    prefetch: Count = _default("batches read ahead by threads", 4)


# -------------------------------------------------------------------------------------- tokenizer


@_config
class TokenizerFile:
    """A tokenizer that exists."""

    kind: Literal["file"] = _doc("a tokenizer that exists")
    path: str = _doc("tokenizer.model, tokenizer.json, or a folder that holds one")


@_config
class TrainedTokenizer:
    """A SentencePiece BPE model trained on the training sources: lossless, with byte fallback."""

    kind: Literal["train"] = _doc("train SentencePiece BPE on the training sources")
    vocab_size: Annotated[int, Field(ge=300)] = _doc(
        "pieces, the 3 control and 256 byte ones in it"
    )
    max_bytes: PositiveInt = _default("text read for training, in bytes", 50_000_000)
    cross_words: bool = _default("pieces may span several words", False)
    infill: bool = _default("4 more control pieces, as data.objective.kind=infill needs", False)


Tokenizer = Annotated[TokenizerFile | TrainedTokenizer, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------ adapt


@_config
class NoAdapter:
    """Every parameter is trained."""

    kind: Literal["none"] = _doc("every parameter is trained")


@_config
class LoraOverride:
    """Another rank or alpha for some of the targets."""

    match: str = _doc("a target by name or path, with * and ?: down, layers.attention.*")
    layers: tuple[Count, ...] | None = _default("in these layers, from 0; null is all", None)
    rank: Count | None = _default("rank there, 0 for no overlay; null leaves it", None)
    alpha: PositiveFloat | None = _default("alpha there; null leaves it", None)

    def __post_init__(self):
        if self.rank is None and self.alpha is None:
            raise ValueError(f"the override of {self.match} says neither rank nor alpha")


@_config
class LoraConfig:
    """Low-rank overlay (LoRA, arXiv:2106.09685): x W + scale (x a) b, of which a and b are trained.

    Patterns name a matrix by its last word or its whole path, with * and ?.
    """

    kind: Literal["lora"] = _doc("low-rank overlay over frozen parameters")
    rank: PositiveInt = _doc("inner dimension of each overlay")
    alpha: PositiveFloat = _doc("the overlay is scaled by alpha / rank")
    rslora: bool = _default("scale by alpha / sqrt(rank) (arXiv:2312.03732)", False)
    dora: bool = _default("train the columns' norms by themselves (DoRA, arXiv:2402.09353)", False)
    dropout: Beta = _default(
        "inputs of the overlay dropped while training; which depends on mesh.context, and on"
        " mesh.replica where training.accumulate is above 1",
        0.0,
    )
    targets: tuple[str, ...] = _default(
        "matrices with an overlay, by name or path, with * and ?",
        ("q", "k", "v", "o", "gate", "up", "down"),
    )
    full: tuple[str, ...] = _default(
        "trained whole, by name or path: embedding, head, *norm, or a matrix", ()
    )
    overrides: tuple[LoraOverride, ...] = _default(
        "other ranks and alphas; the last match wins", ()
    )
    quantize: Literal["none", "int8", "int4", "nf4"] = _default(
        "the frozen matrices of the blocks are kept in this (QLoRA, arXiv:2305.14314); none is"
        " compute.dtype",
        "none",
    )
    learning_rate_ratio: PositiveFloat = _default(
        "the learning rate of every b over that of all else (LoRA+, arXiv:2402.12354)", 1.0
    )
    base: str = _default(
        "where training.init_from is an adapter, which is trained on: its base; empty is where the"
        " adapter says",
        "",
    )


Adapt = Annotated[NoAdapter | LoraConfig, Field(discriminator="kind")]


# --------------------------------------------------------------------------------------- training


@_config
class AdamWConfig:
    """AdamW (arXiv:1711.05101), float32 state, after clipping by global norm."""

    kind: Literal["adamw"] = _doc("Adam with decoupled weight decay")
    beta1: Beta = _doc("decay of the first moment")
    beta2: Beta = _doc("decay of the second moment")
    eps: PositiveFloat = _doc("added to the root of the second moment")
    weight_decay: Nonnegative = _doc("decoupled decay of matrices, times the learning rate")
    clip_norm: PositiveFloat = _doc("largest global norm of the gradient")


@_config
class MuonConfig:
    """Muon (Jordan et al., 2024) for the blocks' matrices, AdamW for the rest.

    Updates have the root mean square of AdamW's (arXiv:2502.16982, equation 4), so that learning
    rate and weight decay carry over.
    """

    kind: Literal["muon"] = _doc("orthogonalised momentum for the blocks' matrices, else AdamW")
    momentum: Beta = _doc("decay of the matrices' Nesterov momentum")
    beta1: Beta = _doc("AdamW: decay of the first moment")
    beta2: Beta = _doc("AdamW: decay of the second moment")
    eps: PositiveFloat = _doc("AdamW: added to the root of the second moment")
    weight_decay: Nonnegative = _doc("decoupled decay of matrices, times the learning rate")
    clip_norm: PositiveFloat = _doc("largest global norm of the gradient")


Optimizer = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


@_config
class CosineSchedule:
    """Linear warm-up, then a half cosine to `floor` times the peak."""

    kind: Literal["cosine"] = _doc("warm-up, then a half cosine")
    peak: PositiveFloat = _doc("learning rate after the warm-up")
    warmup_steps: Count = _doc("steps of linear warm-up")
    floor: Fraction = _doc("last learning rate over the peak")


@_config
class ConstantSchedule:
    """Linear warm-up, then constant."""

    kind: Literal["constant"] = _doc("warm-up, then constant")
    peak: PositiveFloat = _doc("learning rate after the warm-up")
    warmup_steps: Count = _doc("steps of linear warm-up")


@_config
class WsdSchedule:
    """Warm-up, stable, decay (arXiv:2404.06395): constant, then linear to `floor` x the peak."""

    kind: Literal["wsd"] = _doc("warm-up, constant, then a linear decay at the end")
    peak: PositiveFloat = _doc("learning rate after the warm-up")
    warmup_steps: Count = _doc("steps of linear warm-up")
    decay_steps: PositiveInt = _doc("steps of the decay at the end")
    floor: Fraction = _doc("last learning rate over the peak")


Schedule = Annotated[CosineSchedule | ConstantSchedule | WsdSchedule, Field(discriminator="kind")]


@_config
class TrainingConfig:
    """The optimisation."""

    steps: PositiveInt = _doc("optimizer steps of the whole run")
    batch_size: PositiveInt = _doc("rows per step, over all devices")
    accumulate: PositiveInt = _default("microbatches a step is split into", 1)
    init_from: str = _default(
        "begin from these parameters: a run, one of its steps, or a model's folder in any format;"
        " or with adapt.kind=lora from this adapter; empty is from fresh ones",
        "",
    )
    z_loss: Nonnegative = _default("weight of log(Z)^2 in the loss", 0.0)
    optimizer: Optimizer = _doc("optimizer")
    schedule: Schedule = _doc("learning rate")

    def __post_init__(self):
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} must divide batch_size={self.batch_size}"
            )
        warmup = self.schedule.warmup_steps + getattr(self.schedule, "decay_steps", 0)
        if warmup > self.steps:
            raise ValueError(f"schedule: warm-up and decay take {warmup} of steps={self.steps}")


@_config
class EvalConfig:
    """Evaluation on the held-out sources."""

    every: Count = _default("steps between evaluations; 0 is only at the end", 0)
    batch_size: PositiveInt = _default("rows at a time", 16)
    max_rows: Count = _default("rows per evaluation while training; 0 is all", 0)
    stride: Count = _default(
        "at the end: new tokens scored per row, the rest being context; 0 is all of them", 0
    )
    compare_xz: bool = _default("at the end: also compress the held-out text with xz -9", False)


@_config
class CheckpointConfig:
    """Checkpoints of the run."""

    every: Count = _default("steps between checkpoints; 0 is only at the end", 1000)
    keep: PositiveInt = _default("newest checkpoints kept", 2)


@_config
class SampleConfig:
    """The sample that ends a run; `max_new_tokens: 0` is none."""

    prompt: str = _default("text to continue, or with <FILL_ME> in it to fill", "")
    max_new_tokens: Count = _default("tokens to generate", 0)
    temperature: Nonnegative = _default("0 is greedy", 0.8)
    top_k: Count = _default("keep the K likeliest; 0 is off", 0)
    top_p: Fraction = _default("keep the likeliest that sum to this; 1 is off", 0.95)


@_config
class RunConfig:
    """Where a run lives and what it reports."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")] = _doc(
        "folder under `folder`"
    )
    folder: str = _default("folder of runs", "runs")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = _default("every random number comes from this", 0)
    log_every: PositiveInt = _default("steps between lines of the log", 1)
    profile: Annotated[str, Field(pattern=r"^(\d+:\d+)?$")] = _default(
        "FROM:TO writes an xprof trace of these steps", ""
    )
    stop_after: Count = _default("stop, checkpointed, after this step; 0 is off", 0)
    compilation_cache: str = _default(
        "persistent compilation cache; empty is off", "~/.cache/jllama/xla"
    )

    def __post_init__(self):
        if self.profile:
            first, end = map(int, self.profile.split(":"))
            if first >= end:
                raise ValueError(f"profile={self.profile}: FROM must be below TO")


@_config
class StoredConfig:
    """What the config.yaml of a folder says of its parameters: a run's, or a model's alone."""

    model: ModelConfig = _doc("architecture")
    compute: ComputeConfig = _doc("how it is computed, and the dtype it is stored in")
    run: RunConfig | None = _default("the run; a model alone has none", None)
    adapt: Adapt = _default("what is stored is an overlay of another model", NoAdapter(kind="none"))
    scale_dtype: Literal["float32", "bfloat16"] | None = _default(
        "the norms' scales are stored in it; null is compute.param_dtype", None
    )


@_config
class Config:
    """A recipe: everything that a run depends on."""

    model: ModelConfig = _doc(
        "architecture: a name in configs/model, a YAML file, a run or model's folder, or its keys;"
        " with the key base, one of the former and the changes to it"
    )
    compute: ComputeConfig = _doc("how it is computed")
    distributed: DistributedConfig = _default("processes", DistributedConfig())
    mesh: MeshConfig = _default("devices", MeshConfig())
    sharding: ShardingConfig = _default("placement of parameters and activations", ShardingConfig())
    tokenizer: Tokenizer = _doc("text to tokens")
    data: DataConfig = _doc("training and held-out rows")
    adapt: Adapt = _default("what is trained of the model", NoAdapter(kind="none"))
    training: TrainingConfig = _doc("optimisation")
    eval: EvalConfig = _default("evaluation", EvalConfig())
    checkpoint: CheckpointConfig = _default("checkpoints", CheckpointConfig())
    sample: SampleConfig = _default("the sample at the end", SampleConfig())
    run: RunConfig = _doc("the run")

    def __post_init__(self):
        wanted = getattr(self.tokenizer, "vocab_size", None)
        if wanted is not None and wanted > self.model.vocab_size:
            rows = self.model.vocab_size
            raise ValueError(f"tokenizer.vocab_size={wanted} does not fit model.vocab_size={rows}")
        if isinstance(self.adapt, LoraConfig) and not self.training.init_from:
            raise ValueError(
                "adapt.kind=lora: say in training.init_from which model's parameters it adapts"
            )
        if self.data.length > self.model.max_length:
            raise ValueError(
                f"data.length={self.data.length} is above model.max_length={self.model.max_length}"
            )
        if self.sample.max_new_tokens >= self.model.max_length:
            raise ValueError(
                f"sample.max_new_tokens={self.sample.max_new_tokens} leaves no room for a prompt in"
                f" model.max_length={self.model.max_length}"
            )
