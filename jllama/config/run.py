"""A whole recipe, and what a folder keeps of one."""

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
    """The sample that ends a run; `max_new_tokens: 0` is none."""

    prompt: str = default("text to continue, or with <FILL_ME> in it to fill", "")
    max_new_tokens: Count = default("tokens to generate", 0)
    temperature: Nonnegative = default("0 is greedy", 0.8)
    top_k: Count = default("keep the K likeliest; 0 is off", 0)
    top_p: Fraction = default("keep the likeliest that sum to this; 1 is off", 0.95)


@configclass
class RunConfig:
    """Where a run lives and what it reports."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")] = doc(
        "folder under `folder`"
    )
    folder: str = default("folder of runs", "runs")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = default("every random number comes from this", 0)
    log_every: PositiveInt = default("steps between lines of the log", 1)
    profile: Annotated[str, Field(pattern=r"^(\d+:\d+)?$")] = default(
        "FROM:TO writes an xprof trace of these steps", ""
    )
    stop_after: Count = default("stop, checkpointed, after this step; 0 is off", 0)
    compilation_cache: str = default(
        "persistent compilation cache; empty is off", "~/.cache/jllama/xla"
    )

    def __post_init__(self):
        if self.profile:
            first, end = map(int, self.profile.split(":"))
            if first >= end:
                raise ValueError(f"profile={self.profile}: FROM must be below TO")


@configclass
class StoredConfig:
    """What the config.yaml of a folder says of its parameters: a run's, or a model's alone."""

    model: ModelConfig = doc("architecture")
    compute: ComputeConfig = doc("how it is computed, and the dtype it is stored in")
    run: RunConfig | None = default("the run; a model alone has none", None)
    adapt: Adapt = default("what is stored is an overlay of another model", NoAdapter(kind="none"))
    scale_dtype: Literal["float32", "bfloat16"] | None = default(
        "the norms' scales are stored in it; null is compute.param_dtype", None
    )


@configclass
class Config:
    """A recipe: everything that a run depends on."""

    model: ModelConfig = doc(
        "architecture: a name in configs/model, a YAML file, a run or model's folder, or its keys;"
        " with the key base, one of the former and the changes to it"
    )
    compute: ComputeConfig = doc("how it is computed")
    distributed: DistributedConfig = default("processes", DistributedConfig())
    mesh: MeshConfig = default("devices", MeshConfig())
    sharding: ShardingConfig = default("placement of parameters and activations", ShardingConfig())
    tokenizer: TokenizerConfig = doc("text to tokens")
    data: DataConfig = doc("training and held-out rows")
    adapt: Adapt = default("what is trained of the model", NoAdapter(kind="none"))
    training: TrainingConfig = doc("optimisation")
    eval: EvalConfig = default("evaluation", EvalConfig())
    checkpoint: CheckpointConfig = default("checkpoints", CheckpointConfig())
    sample: SampleConfig = default("the sample at the end", SampleConfig())
    run: RunConfig = doc("the run")

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
