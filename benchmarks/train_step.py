"""Measures seconds per train step of a model, and the machine's peak of matrix products.

    python -m benchmarks.train_step --model configs/model/stories-15m.yaml \
        --batch 16 --length 256 --dtype float32 --json
"""

import argparse
import json
import resource
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from jllama.adapt.lora import adapted_flops_per_token, without_whole
from jllama.chips import measured_matmul_flops
from jllama.config import Config, LoraConfig
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.model.llama import init_params
from jllama.model.param import map_leaves
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.train.loss import causal_lm_loss
from jllama.train.state import TrainState, base_quantizer, base_shapes, define_state, init_state
from jllama.train.step import make_train_step


def recipe(args: argparse.Namespace) -> Config:
    """The recipe of the benchmark: the model's config with the published optimizer.

    A LoRA overlay (--set adapt=...) gets a base of random parameters; training.init_from is unused.
    """
    model = recipes.to_dict(recipes.load_model(args.model))
    optimizer = {"kind": "adamw", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
                 "weight_decay": 0.1, "clip_norm": 1.0}  # fmt: skip
    source = {"name": "random", "source": {"kind": "text", "files": ["unused"]}}
    data = {
        "model": model,
        "compute": {"dtype": args.dtype},
        "tokenizer": {"kind": "file", "path": "unused"},
        "data": {"length": args.length, "packing": {"kind": "cut"}, "train": [source]},
        "training": {
            "steps": 1000,
            "batch_size": args.batch,
            "init_from": "unread",
            "optimizer": optimizer,
            "schedule": {"kind": "constant", "peak": 1e-4, "warmup_steps": 0},
        },
        "run": {"name": "benchmark"},
    }
    return recipes.validate(Config, recipes.override(data, args.set, Config), "benchmark")


def ready(config: Config) -> tuple[Any, TrainState, Any, dict[str, jax.Array]]:
    """The jitted step, an initial state, the frozen parameters, and a batch of random rows."""
    placement = Placement(make_mesh(config.mesh), config.sharding)
    definition = define_state(config, placement)
    base = frozen = ()
    if isinstance(config.adapt, LoraConfig):
        shapes = base_shapes(config, placement)
        draw = jax.jit(
            lambda key: jax.tree.map(
                lambda x, s: x.astype(s.dtype),
                init_params(config.model, config.compute, key),
                shapes,
            ),
            out_shardings=jax.tree.map(lambda s: s.sharding, shapes),
        )
        base = map_leaves(draw(jax.random.key(1)), base_quantizer(config))
        frozen = without_whole(base, definition.shapes.trainable)
    state = init_state(definition, 0, base)
    step = make_train_step(config, lambda *a: causal_lm_loss(config, *a), definition, placement)
    shape = (config.training.batch_size, config.data.length + 1)
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, config.model.vocab_size, shape, dtype=np.int32),
        "segments": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }
    return step, state, frozen, placement.put_batch(batch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="name in configs/model, or a YAML file")
    parser.add_argument("--batch", type=int, default=16, help="rows per step")
    parser.add_argument("--length", type=int, default=256, help="predicted tokens per row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    config = recipe(args)
    step, state, frozen, batch = ready(config)
    start = time.perf_counter()
    step = step.lower(state, frozen, batch).compile()
    compile_seconds = time.perf_counter() - start
    peaks = [measured_matmul_flops(args.dtype) / 1e9]
    seconds = []
    for i in range(args.steps + 2):  # two to warm up
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    peaks.append(measured_matmul_flops(args.dtype) / 1e9)
    flops = (
        adapted_flops_per_token(config.model, config.adapt, args.length) * args.batch * args.length
    )
    median = statistics.median(seconds)
    on_device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def figure(value: float) -> float:  # a step takes a millisecond or a minute
        return float(f"{value:.4g}")

    result = {
        "model": args.model,
        "batch": args.batch,
        "length": args.length,
        "dtype": args.dtype,
        "platform": jax.default_backend(),
        "loss": float(metrics["loss"]),
        "compile_seconds": figure(compile_seconds),
        "seconds_per_step": figure(median),
        "seconds_per_step_min": figure(min(seconds)),
        # On a CPU that of the process, with Python and the compiler; else that of the device.
        "peak_memory_bytes": on_device or resident,
        "tokens_per_second": figure(args.batch * args.length / median),
        "gflops_per_second": figure(flops / median / 1e9),
        "matmul_peak_gflops_per_second": figure(statistics.mean(peaks)),
        "fraction_of_peak": figure(flops / median / 1e9 / statistics.mean(peaks)),
    }
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:32} {value}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
