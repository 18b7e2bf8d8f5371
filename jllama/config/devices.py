"""Config of processes, of the device mesh, and of the placement of logical axes on it."""

import dataclasses
from typing import Literal

from jllama.config.base import Count, PositiveInt, configclass, default


@configclass
class DistributedConfig:
    """The processes of one run. JAX detects them on TPU pods, SLURM, Open MPI and Kubernetes."""

    detect: bool = default("detect a cluster; if there is none, the run is a single process", True)
    coordinator: str = default("host:port of process 0; empty means that it is detected", "")
    num_processes: Count = default("with coordinator: number of processes", 0)
    process_id: int = default("with coordinator: index of this process, from 0", -1)
    heartbeat_seconds: PositiveInt = default(
        "seconds of silence after which a process counts as dead", 100
    )
    start_seconds: PositiveInt = default("seconds to wait for all processes to start", 300)


@configclass
class MeshConfig:
    """Number of devices along each mesh axis; one axis may be -1, for all remaining devices."""

    replica: int = default("data parallelism over the data-centre network", 1)
    fsdp: int = default("data parallelism with sharded parameters", -1)
    tensor: int = default("tensor parallelism", 1)
    context: int = default("context parallelism: the positions of a row over devices", 1)

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        if any(s == 0 or s < -1 for s in sizes.values()):
            raise ValueError("sizes are at least 1; one may be -1, for all remaining devices")
        rest = [name for name, s in sizes.items() if s == -1]
        if len(rest) > 1:
            raise ValueError(
                f"{' and '.join(rest)} are -1 (fsdp is unless it is set), but only one may be -1,"
                " for all remaining devices: set the other"
            )


# A candidate is one or several mesh axes. The first one that divides the dimension wins. If the
# last candidate is null, the dimension may stay whole on every device.
MeshAxes = tuple[Literal["replica", "fsdp", "tensor", "context"], ...]
Candidates = tuple[MeshAxes | None, ...]


@configclass
class ShardingConfig:
    """Ordered candidates of mesh axes for each logical axis; see `jllama.parallel.sharding`."""

    batch: Candidates = default("rows of a batch", (("replica", "fsdp"),))
    seq: Candidates = default("positions inside attention and MLP", (("context",), None))
    block_seq: Candidates = default(
        "positions between blocks", (("context", "tensor"), ("context",), None)
    )
    act_embed: Candidates = default("width of an activation", (None,))
    act_heads: Candidates = default("heads of an activation", (("tensor",), None))
    act_kv_heads: Candidates = default("key/value heads of an activation", (("tensor",), None))
    act_ffn: Candidates = default("feed-forward width of an activation", (("tensor",),))
    act_vocab: Candidates = default("logits of a position", (("tensor",), None))
    layers: Candidates = default("stacked layers", (None,))
    vocab: Candidates = default("rows of embedding and head", (("tensor",), None))
    table_embed: Candidates = default(
        "model width of embedding and head; uses tensor if the vocabulary cannot",
        (("tensor", "fsdp", "context"), ("fsdp", "context"), ("tensor", "fsdp"), ("fsdp",)),
    )
    embed: Candidates = default("model width of a parameter", (("fsdp", "context"), ("fsdp",)))
    heads: Candidates = default("query heads of a parameter", (("tensor",),))
    kv_heads: Candidates = default("key/value heads of a parameter", (("tensor",), None))
    head_dim: Candidates = default("width of one head", (None,))
    ffn: Candidates = default("feed-forward width of a parameter", (("tensor",),))
    norm: Candidates = default("scale of a norm", (None,))
    lora_rank: Candidates = default(
        "rank of a LoRA overlay, in parameters and activations", (None,)
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            candidates = getattr(self, field.name)
            for candidate in candidates:
                if candidate is not None and not candidate:
                    raise ValueError(
                        f"{field.name}: a candidate has no mesh axis; write null to replicate"
                    )
                if candidate and len(set(candidate)) < len(candidate):
                    raise ValueError(f"{field.name}: {list(candidate)} names a mesh axis twice")
            if None in candidates[:-1]:
                raise ValueError(
                    f"{field.name}: null must be the last candidate, because it always fits"
                )
