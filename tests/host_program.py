"""Run by test_hosts.py as one of two processes: what it reads of batches and of a checkpoint."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils

from jllama.config import DistributedConfig, MeshConfig, ShardingConfig
from jllama.config import recipe as recipes
from jllama.data.dataset import Dataset, eval_batches
from jllama.parallel import distributed
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.store.fingerprint import fingerprint
from jllama.train.state import define_state, load_state

MESHES = {
    "fsdp=4": (MeshConfig(fsdp=4), ("replica", "fsdp")),
    "fsdp=2,context=2": (MeshConfig(fsdp=2, context=2), ("context", "fsdp")),
    "tensor=4": (MeshConfig(fsdp=1, tensor=4), ("replica", "fsdp")),
}


class Rows:
    """Rows that hold their numbers and remember which were read."""

    length = 1

    def __init__(self, count):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.read.append(int(i))
        row = np.full(2, i, np.int32)
        return {"tokens": row, "segments": row, "weights": row.astype(np.float32)}


def rows(mesh, axes):
    """One epoch as one batch: the rows read, and the batch that all processes made of them."""
    placement = Placement(make_mesh(mesh), dataclasses.replace(ShardingConfig(), batch=(axes,)))
    own, source, held_out = placement.batch_rows(8), Rows(8), Rows(6)
    data = Dataset({"a": source}, {"a": 1.0}, 8, seed=0)
    order = data.batch(0)["tokens"][:, 0].tolist()
    source.read.clear()
    batch = placement.put_batch(data.batch(0, own), 8)
    whole = multihost_utils.process_allgather(batch["tokens"], tiled=True)[:, 0]
    read = sorted(order.index(i) for i in source.read)
    list(eval_batches(held_out, 1, 8, part=own))
    return {
        "read": read,
        "whole": [order.index(i) for i in whole],
        "evaluated": held_out.read,
    }


def bytes_read():
    name = "/tensorstore/kvstore/file/bytes_read"  # absent until something was read
    found = tensorstore.experimental_collect_matching_metrics(name)
    return sum(value["value"] for metric in found for value in metric["values"])


def restored(folder):
    config = recipes.load(folder / "config.yaml")
    definition = define_state(config, Placement(make_mesh(config.mesh), config.sharding))
    before = bytes_read()
    state = load_state(folder, 0, definition)
    leaves = jax.tree.leaves(state)
    files = [p for p in (folder / "checkpoints").rglob("*") if p.is_file() and p.parent.name == "d"]
    return {
        "read": bytes_read() - before,
        "on_disk": sum(p.stat().st_size for p in files),
        "held": sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards),
        "bytes": sum(x.nbytes for x in leaves),
        "fingerprint": fingerprint(state),
    }


def main(port, process, folder):
    config = DistributedConfig(
        coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=int(process)
    )
    distributed.start(config)
    distributed.start(config)  # once is enough
    found = {"rows": {name: rows(*mesh) for name, mesh in MESHES.items()}}
    print(json.dumps(found | restored(Path(folder))))


if __name__ == "__main__":
    main(*sys.argv[1:])
