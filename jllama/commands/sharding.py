"""`jllama sharding`: how each parameter is sharded on a mesh, and its bytes; needs no devices."""

import argparse
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jllama.commands.table import table
from jllama.config import (
    AdamWConfig,
    ComputeConfig,
    MeshConfig,
    ModelConfig,
    Optimizer,
    ShardingConfig,
)
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.model import llama
from jllama.model.param import dotted
from jllama.parallel.mesh import AXES, abstract_mesh, parse_mesh
from jllama.parallel.sharding import Placement
from jllama.store.model import architecture_at
from jllama.train.optimizer import make_optimizer

# The defaults without a recipe: float32 parameters, and AdamW with two moments of each.
_COMPUTE = ComputeConfig(dtype="bfloat16")
_OPTIMIZER = AdamWConfig(
    kind="adamw", beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a name in configs/model or a YAML file"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a recipe instead; keys follow as --section.key=value"
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=SIZE,...",
        help=f"devices along {', '.join(AXES)}, 1 for those left out [the recipe's mesh;"
        " with MODEL fsdp over --devices]",
    )
    parser.add_argument("--devices", type=int, help="number of devices, for a size of -1")
    parser.add_argument("--json", action="store_true", help="print exact figures as JSON")
    parser.set_defaults(overrides=[])  # further arguments are keys of the recipe


def run(args: argparse.Namespace) -> None:
    if (args.model is None) == (args.config is None):
        raise UserError("give either MODEL, or --config FILE and keys as --key=value")
    given = None if args.mesh is None else parse_mesh(args.mesh)
    if args.config is not None:
        words = ["--config", args.config, *args.overrides]
        recipe = recipes.from_arguments(words, architecture_at)
        placement = _placement(given, recipe.mesh, recipe.sharding, args.devices)
        micro = recipe.training.batch_size // recipe.training.accumulate
        placement.mesh_axes((micro,), ("batch",), "rows of a microbatch")
        figures = placement_figures(
            recipe.model, recipe.compute, recipe.training.optimizer, placement
        )
    else:
        if args.overrides:
            raise UserError(_no_keys(" ".join(args.overrides)))
        if given is None and args.devices is None:
            raise UserError(
                "give --mesh AXIS=SIZE,..., such as --mesh fsdp=8,tensor=2, or --devices N"
            )
        model = recipes.load_model(args.model, architecture=architecture_at)
        placement = _placement(given, MeshConfig(), ShardingConfig(), args.devices)
        figures = placement_figures(model, _COMPUTE, _OPTIMIZER, placement)
    print(json.dumps(figures, indent=2) if args.json else _page(figures))


def _no_keys(overrides: str) -> str:
    mesh = ",".join("=".join(x) for x in re.findall(r"--mesh\.(\w+)[= ](-?\d+)", overrides))
    meant = f"; for a mesh give --mesh {mesh}" if mesh else ""
    return f"{overrides}: keys of a recipe go with --config FILE, not with MODEL{meant}"


def _placement(
    given: MeshConfig | None, default: MeshConfig, rules: ShardingConfig, devices: int | None
) -> Placement:
    if devices is not None and devices < 1:
        raise UserError(f"--devices={devices}: must be at least 1")
    mesh = given or default
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    if devices is None and -1 in sizes.values():
        (rest,) = (axis for axis in AXES if sizes[axis] == -1)
        name, more = (f"--mesh {rest}", "") if given else (f"mesh.{rest}", ", or give --mesh")
        raise UserError(f"{name}=-1 takes the rest of the devices: give --devices N{more}")
    count = math.prod(sizes.values()) if devices is None else devices
    return Placement(abstract_mesh(mesh, count), rules)


def placement_figures(
    model: ModelConfig, compute: ComputeConfig, optimizer: Optimizer, placement: Placement
) -> dict[str, Any]:
    """The figures of `--json`; raises `UserError` for a parameter that cannot be sharded."""
    specs = llama.param_specs(model, compute)
    state = _state_bytes(specs, optimizer)
    mesh = dict(placement.mesh.shape)
    parameters = []
    for path, spec in jax.tree.leaves_with_path(specs):
        parts = placement.mesh_axes(spec.shape, spec.axes, dotted(path))
        used = [axis for part in parts for axis in part]
        share = math.prod(spec.shape) // math.prod(mesh[axis] for axis in used)
        parameters.append(
            {
                "parameter": dotted(path),
                "shape": list(spec.shape),
                "axes": list(spec.axes),
                "placement": [list(part) for part in parts],
                "bytes_per_device": share * jnp.dtype(spec.dtype).itemsize,
                "optimizer_bytes_per_device": share * state[path],
                "repeated_over": [
                    a for a in ("fsdp", "context", "tensor") if mesh[a] > 1 and a not in used
                ],
            }
        )
    return {
        "devices": math.prod(mesh.values()),
        "mesh": mesh,
        "parameters": parameters,
        "bytes_per_device": sum(p["bytes_per_device"] for p in parameters),
        "optimizer_bytes_per_device": sum(p["optimizer_bytes_per_device"] for p in parameters),
        "notes": _notes(parameters, mesh),
    }


def _state_bytes(specs: Any, optimizer: Optimizer) -> dict[Any, int]:
    """Bytes of optimizer state for each element of a parameter, by the parameter's path."""
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs)
    state = jax.eval_shape(make_optimizer(optimizer, specs).init, params)
    sizes = {path: 0 for path, _ in jax.tree.leaves_with_path(specs)}
    for path, leaf in jax.tree.leaves_with_path(state):
        for start in range(len(path)):
            if path[start:] in sizes:
                sizes[path[start:]] += leaf.dtype.itemsize
    return sizes


def _notes(parameters: list[dict[str, Any]], mesh: dict[str, int]) -> list[str]:
    """Lines on the vocabulary, and on parameters that several devices repeat."""
    notes = []
    tables = [p for p in parameters if p["axes"][0] == "vocab"]
    rows, width = tables[0]["shape"]
    by_rows, by_width = (math.prod(mesh[a] for a in part) for part in tables[0]["placement"])
    names = " and ".join(p["parameter"].split(".")[0] for p in tables)
    if by_rows == 1 and rows % mesh["tensor"]:
        notes.append(
            f"vocabulary: {rows:,} does not divide by tensor={mesh['tensor']}: {names} keep all"
            f" rows together, and a device has {width // by_width:,} of {width:,} columns"
        )
    else:
        notes.append(
            f"vocabulary: of {names} a device has {rows // by_rows:,} of {rows:,} rows and"
            f" {width // by_width:,} of {width:,} columns"
        )
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for p in parameters:
        if p["repeated_over"]:
            groups.setdefault(tuple(p["repeated_over"]), []).append(p)
    for axes, repeated in groups.items():
        over = " and ".join(f"{a}={mesh[a]}" for a in axes)
        size = sum(p["bytes_per_device"] for p in repeated)
        notes.append(
            f"the same on all devices along {over}: {', '.join(p['parameter'] for p in repeated)}"
            f" ({size:,} bytes on each)"
        )
    if mesh["replica"] > 1:
        notes.append(f"every parameter is the same along replica={mesh['replica']}")
    return notes


def _page(figures: dict[str, Any]) -> str:
    head = ("parameter", "shape", "logical axes", "placement", "bytes/device", "optimizer")
    rows = [
        (
            p["parameter"],
            "x".join(map(str, p["shape"])),
            ",".join(p["axes"]),
            _where(p["axes"], p["placement"]),
            f"{p['bytes_per_device']:,}",
            f"{p['optimizer_bytes_per_device']:,}",
        )
        for p in figures["parameters"]
    ]
    sums = (f"{figures[k]:,}" for k in ("bytes_per_device", "optimizer_bytes_per_device"))
    rows.append(("total", "", "", "", *sums))
    lines = table([head, *rows], left=range(4))
    mesh = ", ".join(f"{axis}={size}" for axis, size in figures["mesh"].items())
    return "\n".join([f"{figures['devices']:,} devices: {mesh}", lines, *figures["notes"]])


def _where(axes: Sequence[str], placement: Sequence[Sequence[str]]) -> str:
    spread = [
        f"{axis}/{'+'.join(part)}" for axis, part in zip(axes, placement, strict=True) if part
    ]
    return " ".join(spread) or "whole"
