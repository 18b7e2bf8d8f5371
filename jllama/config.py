"""Every configuration dataclass; how they are loaded, overridden, described and saved.

A recipe is YAML. OmegaConf merges it with dotted overrides, then pydantic validates the result into
frozen, hashable dataclasses: unknown keys, wrong types and impossible values raise `UserError`, one
line that names the key. A choice between variants is a sum type with a mandatory `kind`.
"""

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from jllama.errors import UserError

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
    factor: PositiveFloat = _doc("positions are divided by this")


@_config
class Llama3RopeScaling:
    """Llama-3.1's banded scaling: long wavelengths divided by `factor`, short ones kept."""

    kind: Literal["llama3"] = _doc("Llama-3.1's banded scaling")
    factor: PositiveFloat = _doc("long wavelengths are multiplied by this")
    low_freq_factor: PositiveFloat = _doc("wavelengths above original_length/this are scaled fully")
    high_freq_factor: PositiveFloat = _doc("wavelengths below original_length/this are kept")
    original_length: PositiveInt = _doc("positions of the pretraining before scaling")

    def __post_init__(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")


RopeScaling = Annotated[
    NoRopeScaling | LinearRopeScaling | Llama3RopeScaling, Field(discriminator="kind")
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


@_config
class ModelConfig:
    """The architecture: everything that decides the function from tokens and parameters to logits.

    Hashable, so that it serves as a static attribute of the modules.
    """

    vocab_size: PositiveInt = _doc("rows of the embedding and of the head")
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


# ------------------------------------------------------------------------------- compute and mesh


@_config
class ComputeConfig:
    """How the function is computed; the architecture does not depend on it.

    Norms, softmax, logits, loss and optimizer state are float32 whatever is chosen here.
    """

    dtype: Literal["float32", "bfloat16"] = _doc("activations and matrix multiplications")
    param_dtype: Literal["float32", "bfloat16"] = _default(
        "stored parameters; bfloat16 loses updates below 1/256 of a weight", "float32"
    )
    remat: Literal["none", "dots", "full"] = _default(
        "the backward pass recomputes: none; dots = all but matrix products; full = each block",
        "none",
    )
    attention_block: PositiveInt = _default(
        "queries attended at a time without a cache: memory grows with this times the length",
        512,
    )
    loss_block: PositiveInt = _default(
        "positions of each row whose logits exist at a time in the loss", 256
    )
    scan_unroll: PositiveInt = _default(
        "layers per iteration of the layer loop: more compiles longer and may run faster", 1
    )


@_config
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1 and takes what is left."""

    replica: int = _default("data parallel over the data-centre network", 1)
    fsdp: int = _default("data parallel with parameters sharded", -1)
    tensor: int = _default("tensor parallel", 1)
    context: int = _default("sequence parallel", 1)

    def __post_init__(self):
        sizes = (self.replica, self.fsdp, self.tensor, self.context)
        if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
            raise ValueError("sizes are at least 1; at most one is -1, which takes what is left")


# A candidate is one or several mesh axes; the first that divides the dimension wins; null, as the
# last candidate, lets the dimension be whole on every device.
MeshAxes = tuple[Literal["replica", "fsdp", "tensor", "context"], ...]
Candidates = tuple[MeshAxes | None, ...]


@_config
class ShardingConfig:
    """Logical axis -> ordered candidates of mesh axes; see `jllama.parallel.sharding`."""

    batch: Candidates = _default("rows of a batch", (("replica", "fsdp"),))
    seq: Candidates = _default("positions of an activation", (("context",), None))
    act_embed: Candidates = _default("width of an activation", (None,))
    act_heads: Candidates = _default("heads of an activation", (("tensor",), None))
    act_kv_heads: Candidates = _default("key/value heads of an activation", (("tensor",), None))
    act_ffn: Candidates = _default("feed-forward width of an activation", (("tensor",),))
    act_vocab: Candidates = _default("logits of a position", (("tensor",), None))
    layers: Candidates = _default("stacked layers", (None,))
    vocab: Candidates = _default("rows of embedding and head", (("tensor",), None))
    embed: Candidates = _default("model width of a parameter", (("fsdp",), None))
    heads: Candidates = _default("query heads of a parameter", (("tensor",),))
    kv_heads: Candidates = _default("key/value heads of a parameter", (("tensor",), None))
    head_dim: Candidates = _default("width of one head", (None,))
    ffn: Candidates = _default("feed-forward width of a parameter", (("tensor",),))
    norm: Candidates = _default("scale of a norm", (None,))

    def __post_init__(self):
        for field in dataclasses.fields(self):
            for candidate in getattr(self, field.name):
                if candidate and len(set(candidate)) < len(candidate):
                    raise ValueError(f"{field.name}: {list(candidate)} names a mesh axis twice")


# ------------------------------------------------------------------------------------------- data


@_config
class StdlibSource:
    """The running interpreter's Python standard library, without tests: one document a file."""

    kind: Literal["stdlib"] = _doc("the running interpreter's own standard library")
    split: Literal["train", "held_out"] = _doc("which part, by a hash of the relative path")
    held_out_one_in: Annotated[int, Field(ge=2)] = _default("one file in so many is held out", 25)


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
class PrepareConfig:
    """How text becomes tokens on disk, once per source and tokenizer."""

    folder: str = _default("where prepared datasets are kept", "prepared")
    shards: PositiveInt = _default("array_record files per dataset", 4)
    block_tokens: PositiveInt = _default("tokens per record", 4096)
    workers: Count = _default("processes that tokenise; 0 is one per core", 0)
    max_skipped: Count = _default("bad documents that may be skipped; one more is an error", 0)


@_config
class DataConfig:
    """Where rows come from and how they are cut."""

    length: PositiveInt = _doc("predicted tokens per row")
    packing: Packing = _doc("how documents fill rows")
    train: tuple[SourceConfig, ...] = _doc("training sources", min_length=1)
    held_out: tuple[SourceConfig, ...] = _default("sources for evaluation", ())
    prepare: PrepareConfig = _default("tokenisation on disk", PrepareConfig())
    prefetch: Count = _default("batches read ahead by threads", 4)


# -------------------------------------------------------------------------------------- tokenizer


@_config
class TokenizerFile:
    """A SentencePiece model that exists."""

    kind: Literal["sentencepiece"] = _doc("a SentencePiece model file")
    path: str = _doc("the .model file")


@_config
class TrainedTokenizer:
    """A SentencePiece BPE model trained on the training sources: lossless, with byte fallback."""

    kind: Literal["train"] = _doc("train SentencePiece BPE on the training sources")
    vocab_size: Annotated[int, Field(ge=300)] = _doc(
        "pieces, the 3 control and 256 byte ones in it"
    )
    max_bytes: PositiveInt = _default("text read for training, in bytes", 50_000_000)
    cross_words: bool = _default("pieces may span several words", False)


Tokenizer = Annotated[TokenizerFile | TrainedTokenizer, Field(discriminator="kind")]


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

    every: Count = _default("steps between checkpoints; 0 is only at the end", 0)
    keep: PositiveInt = _default("newest checkpoints kept", 2)


@_config
class SampleConfig:
    """The sample that ends a run; `max_new_tokens: 0` is none."""

    prompt: str = _default("text to continue", "")
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
class Config:
    """A recipe: everything that a run depends on."""

    model: ModelConfig = _doc("architecture: a name in configs/model, a YAML file, or its keys")
    compute: ComputeConfig = _doc("how it is computed")
    mesh: MeshConfig = _default("devices", MeshConfig())
    sharding: ShardingConfig = _default("placement of parameters and activations", ShardingConfig())
    tokenizer: Tokenizer = _doc("text to tokens")
    data: DataConfig = _doc("training and held-out rows")
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
        if self.data.length > self.model.max_length:
            raise ValueError(
                f"data.length={self.data.length} is above model.max_length={self.model.max_length}"
            )
        if self.sample.max_new_tokens >= self.model.max_length:
            raise ValueError(
                f"sample.max_new_tokens={self.sample.max_new_tokens} leaves no room for a prompt in"
                f" model.max_length={self.model.max_length}"
            )


# ---------------------------------------------------------------------------- load, override, save

T = typing.TypeVar("T")


def configs_folder() -> Path:
    """The shipped recipes: `configs/` of the checkout, or the copy inside an installed wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "model").is_dir():
            return folder
    raise UserError("the shipped configs are missing: reinstall jllama")


def model_names() -> list[str]:
    """Names of the shipped models, as `model: NAME` takes them."""
    return sorted(p.stem for p in (configs_folder() / "model").glob("*.yaml"))


def _read_yaml(path: Path) -> dict:
    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as e:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(e).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values at the top level")
    return data


def _model_dict(name: str) -> dict:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = configs_folder() / "model" / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"model: no {name!r}; shipped models: {', '.join(model_names())}")
    return _read_yaml(path)


def load_model(name: str, overrides: Sequence[str] = ()) -> ModelConfig:
    """A shipped model by name, or a YAML file; `overrides` are dotted `key=value`."""
    return _validate(ModelConfig, override(_model_dict(name), overrides), where=name)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe, applies dotted overrides (`model.num_layers=4`), validates."""
    path = Path(path)
    data = _read_yaml(path)
    # `model=NAME` is the model's whole file, wherever it stands; other overrides go on top of it.
    rest = []
    for item in overrides:
        key, _, value = item.partition("=")
        if key == "model" and not value.lstrip().startswith("{"):
            data["model"] = value
        else:
            rest.append(item)
    if isinstance(data.get("model"), str):
        data["model"] = _model_dict(data["model"])
    return _validate(Config, override(data, rest), where=str(path))


def override(data: dict, overrides: Sequence[str]) -> dict:
    """Sets dotted `key=value` in plain nested values, in place, before validation."""
    given: set[str] = set()
    for item in overrides:
        key, eq, text = item.partition("=")
        if not eq or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
            raise UserError(f"{item!r}: an override is written key=value, with dots inside the key")
        try:
            value = OmegaConf.to_container(OmegaConf.create({"v": _scalar(text)}))["v"]
        except (yaml.YAMLError, OmegaConfBaseException) as e:
            raise UserError(
                f"{key}: {text!r} is not a YAML value: {' '.join(str(e).split())}"
            ) from None
        _assign(data, key, value, given)
        given.add(key)
    return data


def _scalar(text: str) -> Any:
    # OmegaConf's own dotlist parser reads 1e-3 as a number, which plain YAML 1.1 does not.
    if re.fullmatch(r"(\d+:\d+)?", text):
        return text  # nothing is no null; YAML 1.1 takes FROM:TO for a number in base 60
    value = OmegaConf.to_container(OmegaConf.from_dotlist([f"v={text}"]))["v"]
    # Plain text is taken as it stands: YAML would drop spaces at its ends and what follows " #".
    plain = isinstance(value, str) and not text.lstrip().startswith(("'", '"', "|", ">", "&", "!"))
    return text if plain else value


def _assign(data: dict, key: str, value: Any, given: set[str]) -> None:
    node: Any = data
    *parents, last = key.split(".")
    for i, name in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, name, ".".join(parents[: i + 1]))]
        else:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, (dict, list)):
            raise UserError(f"{key}: {'.'.join(parents[: i + 1])} is a single value, without keys")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    elif last == "kind" and node.get("kind") != value:
        # Another member of a sum type: the keys of the old one mean nothing in it. Those that an
        # earlier override set are meant for the new one.
        kept = {k: v for k, v in node.items() if ".".join([*parents, k]) in given}
        node.clear()
        node |= kept | {"kind": value}
    else:
        node[last] = value


def _index(node: list, name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise UserError(f"{key}: a list of {len(node)} takes an index below {len(node)}")
    return int(name)


def _validate(cls: type[T], data: dict, where: str) -> T:
    try:
        # JSON mode: strict about types, and lists still become tuples.
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
    except (TypeError, ValueError) as e:
        if isinstance(e, pydantic.ValidationError):
            raise UserError(f"{where}: {_explain(cls, e)}") from None
        raise UserError(f"{where}: not plain values: {e}") from None


def _explain(cls: type, error: pydantic.ValidationError) -> str:
    # An unknown key is the likeliest mistake and the likeliest cause of the others.
    errors = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    first = errors[0]
    path, allowed, tags = _walk(cls, first["loc"])
    key = ".".join(path) or "config"
    kind = first["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(path[-1], allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        text = f"unknown key; {hint}allowed: {', '.join(allowed)}"
    elif kind in ("missing", "missing_argument"):
        text = "is required and missing"
    elif kind == "union_tag_not_found":
        text = f"needs a kind; allowed: {', '.join(map(repr, tags))}"
    elif kind == "union_tag_invalid":
        text = f"kind {first['ctx']['tag']!r} is unknown; allowed: {first['ctx']['expected_tags']}"
    elif kind == "value_error":
        text = str(first["ctx"]["error"])
    else:
        text = first["msg"][0].lower() + first["msg"][1:] + f", not {json.dumps(first['input'])}"
        if kind == "string_type" and not isinstance(first["input"], dict | list):
            text += "; put text that YAML reads as something else in double quotes"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{key}: {text}{more}"


def _walk(cls: Any, loc: Sequence[str | int]) -> tuple[list[str], list[str], list[str]]:
    """Pydantic's location without the sum types' tags; the keys and the kinds allowed there."""
    path: list[str] = []
    allowed: list[str] = []
    members = _members(cls)
    for part in loc:
        tag = next((m for m in members if _tag(m) == part), None)
        if tag is not None and len(members) > 1:
            members = (tag,)
            continue
        path.append(str(part))
        fields = {f.name: f for m in members if dataclasses.is_dataclass(m) for f in _fields(m)}
        allowed = list(fields) or allowed
        if isinstance(part, str) and part in fields:
            members = _members(_hints_of(members, part))
    return path, allowed, [t for m in members if (t := _tag(m))]


def _fields(cls: type) -> tuple:
    return dataclasses.fields(cls)


def _hints_of(members: Sequence[type], name: str) -> Any:
    owner = next(m for m in members if name in {f.name for f in _fields(m)})
    return typing.get_type_hints(owner, include_extras=True)[name]


def _strip(hint: Any) -> Any:
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return hint


def _members(hint: Any) -> tuple[type, ...]:
    """The dataclasses that a type hint admits: itself, a union's members, or a tuple's items."""
    hint = _strip(hint)
    if dataclasses.is_dataclass(hint):
        return (hint,)
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        return tuple(m for a in typing.get_args(hint) if a is not Ellipsis for m in _members(a))
    return ()


def _tag(cls: type) -> str | None:
    kind = typing.get_type_hints(cls).get("kind") if dataclasses.is_dataclass(cls) else None
    return typing.get_args(kind)[0] if kind is not None else None


def to_dict(config: Any) -> Any:
    """Plain nested values of a config, fit for YAML and JSON."""
    return json.loads(pydantic.TypeAdapter(type(config)).dump_json(config))


def from_dict(data: dict, where: str) -> Config:
    """The inverse of `to_dict` for a whole recipe; `where` names the file in errors."""
    return _validate(Config, data, where)


def to_yaml(config: Any) -> str:
    """The resolved config as YAML; `load` reads it back to an equal config."""
    # OmegaConf's own writer: it quotes every text that its reader would take for a number.
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(to_dict(config))))


def _escaped(value: Any) -> Any:
    """Nested values in which no text is an interpolation: `load` would resolve `${...}`."""
    match value:
        case dict():
            return {k: _escaped(v) for k, v in value.items()}
        case list():
            return [_escaped(v) for v in value]
        case str():
            return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)
    return value


def describe(cls: type = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key of a recipe, as (dotted key, type, meaning with its default)."""
    rows = []
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in _fields(cls):
        hint, key = hints[field.name], prefix + field.name
        members = _members(hint)
        many = typing.get_origin(_strip(hint)) is tuple
        info = field.default  # pydantic keeps its FieldInfo here
        meaning = info.description
        if not members:
            if not info.is_required():
                meaning += f" [{pydantic.TypeAdapter(hint).dump_json(info.default).decode()}]"
            rows.append((key, _type_name(hint), meaning))
            continue
        kinds = [k for m in members if (k := _tag(m))]
        rows.append((key, "list" if many else " | ".join(kinds) or "keys", meaning))
        for member in members:
            inner = f"{key}.0." if many else f"{key}."
            tag = _tag(member)
            for k, t, m in describe(member, inner):
                rows.append((k, t, f"({tag}) {m}" if len(kinds) > 1 and tag else m))
    return rows


def _type_name(hint: Any) -> str:
    hint = _strip(hint)
    if typing.get_origin(hint) is Literal:
        return "|".join(str(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        names = [_type_name(a) for a in typing.get_args(hint)]
        return "|".join(names)
    if typing.get_origin(hint) is tuple:
        return "list"
    return {type(None): "null"}.get(hint, getattr(hint, "__name__", str(hint)))


def from_arguments(argv: Sequence[str]) -> Config:
    """The recipe of a command line: `--config F --section.key=value --section.key value ...`."""
    pairs, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r}: expected --config FILE or --section.key=value")
        key, eq, value = word[2:].partition("=")
        if not eq:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key}: needs a value")
            value = rest.pop(0)
        pairs.append((key, value))
    files = [value for key, value in pairs if key == "config"]
    if len(files) != 1:
        raise UserError(f"--config FILE: give it once; shipped: {', '.join(_recipes())}")
    return load(files[0], [f"{key}={value}" for key, value in pairs if key != "config"])


def _recipes() -> list[str]:
    return [f"configs/train/{p.name}" for p in sorted((configs_folder() / "train").glob("*.yaml"))]


def help_text() -> str:
    """Every key of a recipe with its type, meaning and default, one a line."""
    rows = [(f"--{key}", kind, meaning) for key, kind, meaning in describe()]
    width = max(len(key) for key, _, _ in rows)
    lines = [f"{key:{width}}  {kind}: {meaning}" for key, kind, meaning in rows]
    recipes = "\n  ".join(_recipes())
    return f"--config FILE: the recipe; shipped:\n  {recipes}\n\nKeys:\n" + "\n".join(lines)
