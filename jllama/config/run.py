"""Config of a whole run (a recipe), and of the parameters that a folder stores."""

from typing import Annotated, Literal

from pydantic import Field

from jllama.config.adapt import Adapt, LoraConfig, NoAdapter
from jllama.config.base import Count, Fraction, Nonnegative, PositiveInt, configclass, default, doc
from jllama.config.compute import ComputeConfig
from jllama.config.data import DataConfig
from jllama.config.devices import DistributedConfig, MeshConfig, ShardingConfig
from jllama.config.model import ModelConfig
from jllama.config.tokenizer import TokenizerConfig
from jllama.config.training import CheckpointConfig, EvalConfig, TrainingConfig


@configclass
class SampleConfig:
    """The sample at the end of a run; `max_new_tokens: 0` means none.

    The other defaults are also those of sample.py and of `jllama.load(...).generate`.
    """

    prompt: str = default("text to continue, or to fill in at <FILL_ME>", "")
    max_new_tokens: Count = default("tokens to generate", 0)
    temperature: Nonnegative = default("temperature of the distribution; 0 means greedy", 1.0)
    top_k: Count = default("sample from this many likeliest tokens; 0 means all", 0)
    top_p: Fraction = default("sample from the likeliest tokens that sum to this; 1 means all", 1.0)


@configclass
class RunConfig:
    """Where a run is stored and what it reports."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")] = doc(
        "name of the run: its folder in run.folder"
    )
    folder: str = default("folder of runs", "runs")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = default("seed of every random number", 0)
    log_every: PositiveInt = default("steps between lines of the log", 1)
    profile: Annotated[str, Field(pattern=r"^(\d+:\d+)?$")] = default(
        "FROM:TO, the steps of which an xprof trace is written; empty means none", ""
    )
    stop_after: Count = default("save a checkpoint and stop after this step; 0 means never", 0)
    compilation_cache: str = default(
        "folder of the persistent compilation cache; empty means none", "~/.cache/jllama/xla"
    )

    def __post_init__(self):
        if self.profile:
            first, end = map(int, self.profile.split(":"))
            if first >= end:
                raise ValueError(f"profile={self.profile}: FROM must be below TO")


@configclass
class StoredConfig:
    """The part of a folder's config.yaml about its parameters: those of a run, or of a model."""

    model: ModelConfig = doc("architecture")
    compute: ComputeConfig = doc("computation, and the dtype of the stored parameters")
    run: RunConfig | None = default("the run; null if the folder holds only a model", None)
    adapt: Adapt = default("overlay of another model, if one is stored", NoAdapter(kind="none"))
    scale_dtype: Literal["float32", "bfloat16"] | None = default(
        "dtype of the norms' stored scales; null means compute.param_dtype", None
    )


@configclass
class Config:
    """A recipe: everything that a run depends on."""

    model: ModelConfig = doc(
        "architecture: a name in configs/model, a YAML file, the folder of a run or model, or its"
        " keys; keys beside `base` change the model that `base` names"
    )
    compute: ComputeConfig = doc("computation")
    distributed: DistributedConfig = default("processes", DistributedConfig())
    mesh: MeshConfig = default("devices", MeshConfig())
    sharding: ShardingConfig = default("placement of parameters and activations", ShardingConfig())
    tokenizer: TokenizerConfig = doc("tokenizer")
    data: DataConfig = doc("training and held-out rows")
    adapt: Adapt = default("trained parameters", NoAdapter(kind="none"))
    training: TrainingConfig = doc("optimisation")
    eval: EvalConfig = default("evaluation", EvalConfig())
    checkpoint: CheckpointConfig = default("checkpoints", CheckpointConfig())
    sample: SampleConfig = default("sample at the end of the run", SampleConfig())
    run: RunConfig = doc("name and folder of the run, and what it reports")

    def __post_init__(self):
        trained = getattr(self.tokenizer, "vocab_size", 0)
        if trained > self.model.vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size={trained} does not fit into"
                f" model.vocab_size={self.model.vocab_size}"
            )
        if isinstance(self.adapt, LoraConfig) and not self.training.init_from:
            raise ValueError(
                "adapt.kind=lora: needs training.init_from, the model whose parameters it adapts"
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
