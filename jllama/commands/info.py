"""`jllama info`: what a model costs, from its config alone."""

import argparse
import json
from typing import Any

from jllama import flops, storage
from jllama import recipe as recipes
from jllama.config import ModelConfig
from jllama.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a name in configs/model, a YAML file, a model's folder; all shipped if left out",
    )
    parser.add_argument("--all", action="store_true", help="a table of every shipped model")
    parser.add_argument(
        "--length",
        type=int,
        help="tokens per row for the FLOPs [the run's rows, else the model's max_length]",
    )
    parser.add_argument("--json", action="store_true", help="exact figures, for programs")


def run(args: argparse.Namespace) -> None:
    if args.all and args.model:
        raise UserError(f"--all is every shipped model: leave out {args.model!r}")
    if args.length is not None and args.length < 1:
        raise UserError(f"--length={args.length}: at least 1")
    if args.model:
        figures = describe(args.model, *_load(args.model), length=args.length)
        print(json.dumps(figures, indent=2) if args.json else _page(figures))
        return
    shipped = [describe(name, *_load(name), length=args.length) for name in recipes.model_names()]
    shipped.sort(key=lambda figures: figures["parameters"])
    print(json.dumps(shipped, indent=2) if args.json else _table(shipped))


def _load(model: str) -> tuple[ModelConfig, int]:
    """The model, and the length of the rows it is trained on."""
    folder = storage.path(model)
    if model in recipes.model_names() or not storage.is_folder(folder):
        found = recipes.load_model(model)
    elif not storage.exists(folder / "config.yaml"):
        # Importing jax takes seconds, which no other model needs.
        from jllama.train.stored import architecture  # noqa: PLC0415

        found = architecture(folder)
    elif (stored := recipes.load_stored(folder / "config.yaml")).run is None:
        found = stored.model
    else:  # a run, which may have no checkpoint yet
        recipe = recipes.load(folder / "config.yaml")
        return recipe.model, recipe.data.length
    return found, found.max_length


def describe(
    name: str, model: ModelConfig, row_length: int, length: int | None = None
) -> dict[str, Any]:
    """The figures of `--json`."""
    length = row_length if length is None else length
    parameters, padding = flops.parameter_count(model), flops.padding_count(model)
    return {
        "model": name,
        "parameters": parameters,
        "padding": padding,
        "bytes": {dtype: (parameters + padding) * size for dtype, size in flops.BYTES.items()},
        "length": length,
        "forward_flops_per_token": flops.forward_flops_per_token(model, length),
        "train_flops_per_token": flops.train_flops_per_token(model, length),
        "kv_cache_bytes_per_token": {
            dtype: flops.kv_cache_bytes_per_token(model, dtype) for dtype in flops.BYTES
        },
    }


def _page(figures: dict[str, Any]) -> str:
    size, cache = figures["bytes"], figures["kv_cache_bytes_per_token"]
    rows = [
        ("parameters", f"{figures['parameters']:,}"),
        *(
            [("padding of the vocabulary", f"{padding:,}")]
            if (padding := figures["padding"])
            else []
        ),
        ("bytes, float32", f"{size['float32']:,} ({size['float32'] / 1e9:.2f} GB)"),
        ("bytes, bfloat16", f"{size['bfloat16']:,} ({size['bfloat16'] / 1e9:.2f} GB)"),
        (
            "training FLOPs per token",
            f"{figures['train_flops_per_token']:.4g} (rows of {figures['length']:,} tokens)",
        ),
        ("KV-cache bytes per token, float32", f"{cache['float32']:,}"),
        ("KV-cache bytes per token, bfloat16", f"{cache['bfloat16']:,}"),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join([figures["model"], *(f"  {label:<{width}}  {text}" for label, text in rows)])


def _table(models: list[dict[str, Any]]) -> str:
    head = (
        "model", "parameters", "GB float32", "GB bfloat16", "length", "train GFLOPs/token",
        "KV bytes/token bfloat16",
    )  # fmt: skip
    rows = [
        (
            m["model"],
            f"{m['parameters']:,}",
            f"{m['bytes']['float32'] / 1e9:.2f}",
            f"{m['bytes']['bfloat16'] / 1e9:.2f}",
            f"{m['length']:,}",
            f"{m['train_flops_per_token'] / 1e9:.2f}",
            f"{m['kv_cache_bytes_per_token']['bfloat16']:,}",
        )
        for m in models
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for name, *numbers in [head, *rows]:
        cells = [number.rjust(w) for number, w in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)
