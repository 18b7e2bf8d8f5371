"""Compares training an overlay with training every parameter: time, FLOPs, bytes.

    python -m benchmarks.lora

The variants take their steps in turn, so that other load of the machine slows all alike. The first
two steps of each, of which one compiles, are not timed. FLOPs are XLA's count of the gradient, with
the layers unrolled.
"""

import argparse
import functools
import gc
import statistics
import sys
import time

import jax

from benchmarks.train_step import ready, recipe
from jllama.adapt.lora import adapted_flops_per_token
from jllama.config import Config
from jllama.config import recipe as recipes
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.progress import say
from jllama.train.loss import causal_lm_loss
from jllama.train.state import define_state

LORA = "{{kind: lora, rank: {rank}, alpha: 32{more}}}"
VARIANTS = {
    "every parameter": "{kind: none}",
    "LoRA, rank 8": LORA.format(rank=8, more=""),
    "LoRA, rank 16": LORA.format(rank=16, more=""),
    "LoRA, rank 64": LORA.format(rank=64, more=""),
    "LoRA, rank 16, dropout 0.05": LORA.format(rank=16, more=", dropout: 0.05"),
    "DoRA, rank 16": LORA.format(rank=16, more=", dora: true"),
    "LoRA, rank 8, embedding (tied) whole": LORA.format(rank=8, more=", full: [embedding]"),
    "QLoRA, rank 16, int8": LORA.format(rank=16, more=", quantize: int8"),
    "QLoRA, rank 16, nf4": LORA.format(rank=16, more=", quantize: nf4"),
}


def variant(args: argparse.Namespace, adapt: str, *more: str) -> Config:
    args.set = [f"adapt={adapt}", *more]
    return recipe(args)


def flops(config: Config) -> float:
    """FLOPs of the gradient for one row, counted by XLA with unrolled layers and whole logits."""
    config = recipes.validate(
        Config,
        recipes.override(
            recipes.to_dict(config),
            [
                f"compute.scan_unroll={config.model.num_layers}",
                "compute.loss_block=1000000",
                "compute.attention={kind: reference}",
                "training.batch_size=1",
            ],
        ),
        "flops",
    )
    definition = define_state(config, Placement(make_mesh(config.mesh), config.sharding))
    loss = functools.partial(causal_lm_loss, config)
    key = jax.random.key(0)
    row = {
        name: jax.ShapeDtypeStruct((1, config.data.length + 1), dtype)
        for name, dtype in (("tokens", "int32"), ("segments", "int32"), ("weights", "float32"))
    }
    gradient = jax.jit(jax.grad(lambda t, f, b: loss(t, f, b, key)[0]))
    compiled = gradient.lower(definition.shapes.trainable, definition.frozen, row).compile()
    return compiled.cost_analysis()["flops"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stories-110m", help="name in configs/model, or a file")
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="predicted tokens per row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each variant")
    parser.add_argument("--only", nargs="*", help="run these variants alone")
    args = parser.parse_args()
    names = args.only or list(VARIANTS)
    running, rows = {}, {}
    for name in names:
        config = variant(args, VARIANTS[name])
        step, state, frozen, batch = ready(config)
        running[name] = [step, state, frozen, batch]
        rows[name] = {
            "flops": flops(config),
            "counted": args.length
            * adapted_flops_per_token(config.model, config.adapt, args.length),
            "trained": sum(x.size for x in jax.tree.leaves(state.trainable)),
            "state": sum(x.nbytes for x in jax.tree.leaves((state.trainable, state.opt_state))),
            "frozen": sum(x.nbytes for x in jax.tree.leaves(frozen)),
            "seconds": [],
        }
        say(f"counted: {name}")
    gc.collect()
    for i in range(args.steps + 2):
        for name, (step, state, frozen, batch) in running.items():
            start = time.perf_counter()
            running[name][1], metrics = step(state, frozen, batch)
            del state
            jax.block_until_ready((running[name][1], metrics))
            if i >= 2:
                rows[name]["seconds"].append(time.perf_counter() - start)
    first = rows[names[0]]
    heads = ("trained", "parameters", "s a step", "time", "FLOPs", "state", "frozen")
    print("| " + " | ".join(heads) + " |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        # In turn, so that a slow minute of the machine slows all variants.
        ratio = statistics.median(
            a / b for a, b in zip(row["seconds"], first["seconds"], strict=True)
        )
        print(
            f"| {name} | {row['trained']:,} | {statistics.median(row['seconds']):.3f} | {ratio:.2f}"
            f" | {row['flops'] / first['flops']:.3f} | {row['state'] / 2**20:.1f} MiB"
            f" | {row['frozen'] / 2**20:.1f} MiB |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
