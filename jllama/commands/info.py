"""`jllama info`: the cost of a model, or of an adapter over one, from its config alone."""

import argparse
import json
from typing import Any

from jllama import flops
from jllama.commands.table import table
from jllama.config import LoraConfig, ModelConfig
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.files import storage
from jllama.store.find import RECIPE, Found, find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a name in configs/model, a YAML file, the folder of a model or an adapter; [all"
        " shipped models]",
    )
    parser.add_argument(
        "--base", metavar="PATH", help="if MODEL is PEFT's adapter: its model [the one it names]"
    )
    parser.add_argument("--all", action="store_true", help="a table of every shipped model")
    parser.add_argument(
        "--length",
        type=int,
        help="tokens per row for the FLOPs [the run's rows, else the model's max_length]",
    )
    parser.add_argument("--json", action="store_true", help="print exact figures as JSON")


def run(args: argparse.Namespace) -> None:
    if args.all and args.model:
        raise UserError(f"--all lists every shipped model: leave out {args.model!r}")
    if args.length is not None and args.length < 1:
        raise UserError(f"--length={args.length}: must be at least 1")
    if args.model:
        figures = _figures(args.model, args.base, args.length)
        print(json.dumps(figures, indent=2) if args.json else _page(figures))
        return
    if args.base:
        raise UserError("--base is for an adapter: give it as MODEL")
    models = {name: recipes.load_model(name) for name in recipes.model_names()}
    shipped = [model_figures(name, m, args.length or m.max_length) for name, m in models.items()]
    shipped.sort(key=lambda figures: figures["parameters"])
    print(json.dumps(shipped, indent=2) if args.json else _table(shipped))


def _figures(name: str, base: str | None, length: int | None) -> dict[str, Any]:
    """The figures of a model, or of an adapter over one."""
    path = storage.path(name)
    if name in recipes.model_names() or not storage.is_folder(path):
        model = recipes.load_model(name)
        return model_figures(name, model, length or model.max_length)
    found = find(path)
    if base and found.format != "peft":
        raise UserError(f"--base is for an adapter of PEFT's, which {path} is not: leave it out")
    if found.stored is None:
        return _foreign_figures(name, found, base, length)
    # A run may have no checkpoint yet.
    model, recipe = found.stored.model, None
    if found.is_run:
        recipe = recipes.load(found.folder / RECIPE)
    length = length or (recipe.data.length if recipe else model.max_length)
    figures = model_figures(name, model, length)
    if not found.is_adapter:
        return figures
    # jax takes seconds to import, which a model of ours does not need.
    from jllama.store.adapter import BASE, read_base_note  # noqa: PLC0415

    over = recipe.training.init_from if recipe else ""
    if BASE in found.files:  # as a run has once it has begun
        over, _ = read_base_note(found.folder)
    return figures | _overlay_figures(model, found.stored.adapt, length, over)


def _foreign_figures(
    name: str, found: Found, base: str | None, length: int | None
) -> dict[str, Any]:
    # Importing jax takes seconds, which no other model needs.
    from jllama.store.adapter import base_of, open_adapter  # noqa: PLC0415
    from jllama.store.model import architecture  # noqa: PLC0415

    if not found.is_adapter:
        model = architecture(found)
        return model_figures(name, model, length or model.max_length)
    adapter = open_adapter(found)
    model_found = base_of(adapter, base)
    model = adapter.trained_config(architecture(model_found))
    length = length or model.max_length
    over = _overlay_figures(model, adapter.lora(model), length, str(model_found.path))
    return model_figures(name, model, length) | over


def _overlay_figures(
    model: ModelConfig, adapt: LoraConfig, length: int, base: str | None
) -> dict[str, Any]:
    """Figures of an adapter, which add to or replace those of its base."""
    from jllama.adapt import lora  # noqa: PLC0415

    return {
        "base": base or "a model that it does not name",
        "adapt": recipes.to_dict(adapt),
        "adapted": lora.layout(model, adapt),
        "trained_parameters": lora.trained_parameter_count(model, adapt),
        "train_flops_per_token": lora.adapted_flops_per_token(model, adapt, length),
    }


def model_figures(name: str, model: ModelConfig, length: int) -> dict[str, Any]:
    """The figures of `--json`."""
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
        *_adapter_rows(figures),
        *[("padding of the vocabulary", f"{n:,}") for n in [figures["padding"]] if n],
        ("bytes, float32", f"{size['float32']:,} ({size['float32'] / 1e9:.2f} GB)"),
        ("bytes, bfloat16", f"{size['bfloat16']:,} ({size['bfloat16'] / 1e9:.2f} GB)"),
        (
            "training FLOPs per token",
            f"{figures['train_flops_per_token']:.4g} (rows of {figures['length']:,} tokens)",
        ),
        ("KV-cache bytes per token, float32", f"{cache['float32']:,}"),
        ("KV-cache bytes per token, bfloat16", f"{cache['bfloat16']:,}"),
    ]
    return f"{figures['model']}\n{table(rows, left=range(2), indent='  ')}"


def _adapter_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    if "adapted" not in figures:
        return []
    trained, by_setting = figures["trained_parameters"], {}
    for path, how in figures["adapted"].items():
        by_setting.setdefault(how.partition(" ")[2], []).append(path)
    share = trained / figures["parameters"]
    return [
        ("adapter over", figures["base"]),
        ("trained over them", f"{trained:,} ({share:.2%})"),
        *((how, ", ".join(paths)) for how, paths in by_setting.items()),
    ]


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
    return table([head, *rows])
