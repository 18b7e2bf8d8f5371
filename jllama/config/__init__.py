"""All config dataclasses: frozen, hashable, validated by pydantic.

A choice between variants is a sum type with a mandatory `kind`. `jllama.config.recipe` loads,
overrides and saves configs.
"""

from jllama.config.adapt import Adapt, LoraConfig, LoraOverride, NoAdapter
from jllama.config.base import Beta, Count, Fraction, Nonnegative, PositiveFloat, PositiveInt
from jllama.config.compute import (
    AttentionConfig,
    AutoAttention,
    BlockwiseAttention,
    ComputeConfig,
    CudnnAttention,
    ReferenceAttention,
    SplashAttention,
)
from jllama.config.data import (
    CausalObjective,
    CutPacking,
    DataConfig,
    HeldOut,
    HeldOutShare,
    InfillObjective,
    JsonlSource,
    Objective,
    Packing,
    ParquetSource,
    PrepareConfig,
    ReplyObjective,
    Source,
    SourceConfig,
    StdlibSource,
    TextSource,
    TfdsSource,
    WholePacking,
)
from jllama.config.devices import (
    Candidates,
    DistributedConfig,
    MeshAxes,
    MeshConfig,
    ShardingConfig,
)
from jllama.config.model import FanInInit, Init, ModelConfig, TruncatedNormalInit
from jllama.config.rope import (
    LARGEST_FACTOR,
    AdaptiveRopeScaling,
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    NoRopeScaling,
    NtkRopeScaling,
    RopeScaling,
    Stretch,
    YarnRopeScaling,
)
from jllama.config.run import Config, RunConfig, SampleConfig, StoredConfig
from jllama.config.tokenizer import LEAST_PIECES, TokenizerConfig, TokenizerFile, TrainedTokenizer
from jllama.config.training import (
    AdamWConfig,
    CheckpointConfig,
    ConstantSchedule,
    CosineSchedule,
    EvalConfig,
    MuonConfig,
    Optimizer,
    Schedule,
    TrainingConfig,
    WsdSchedule,
)
