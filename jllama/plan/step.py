"""Compiles the real train step and evaluation for absent devices, as a program.

    python -m jllama.plan.step < {"config": ..., "topology": ..., "slices": ...} > report

Each compilation is a process (`jllama.plan.process`), because the compiler's library needs an
environment of its own, prints on stdout, and may abort its process.
"""

import functools
import importlib.metadata
import json
import math
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jllama.adapt.quant import quantizing
from jllama.config import Config
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.model.llama import param_specs
from jllama.model.param import dotted
from jllama.parallel.sharding import Placement
from jllama.plan import bounds, hlo
from jllama.plan.counts import counted, seconds_to_send
from jllama.plan.devices import compile_only_devices, hbm_bytes
from jllama.plan.topology import Topology, parse
from jllama.train.compiler import xla_options
from jllama.train.loss import causal_lm_loss
from jllama.train.placement import check_batches, make_placement
from jllama.train.state import StateDef, base_shapes, define_state
from jllama.train.step import make_eval_step, make_train_step

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SIZE = r"([\d.]+)([KMGTP]?)B?"


def report(config: Config, topology: Topology) -> dict[str, Any]:
    """Compiles step and evaluation and reports what they need; docs/planning.md lists the keys.

    If the compiler refuses one for its memory, `fits` is false and the report has the message. Any
    other failure raises.
    """
    capacity = hbm_bytes(topology)
    devices = compile_only_devices(topology)
    placement = make_placement(config, devices)
    definition = define(config, placement)
    state = definition.placed
    batch = abstract_batch(config, placement, config.training.batch_size)
    known = {
        "parameters": bytes_per_device(state.trainable),
        "optimizer": bytes_per_device((state.step, state.opt_state)),
        "batch": bytes_per_device(batch),
    }
    if definition.frozen:
        known["frozen"] = bytes_per_device(definition.frozen)
    mesh = dict(placement.mesh.shape)
    times = _bounds(config, placement, topology, definition)
    loss = functools.partial(causal_lm_loss, config)
    step = make_train_step(config, loss, definition, placement)
    start = time.perf_counter()
    memory, compiled = _compiled(step, (state, definition.frozen, batch), known)
    compile_seconds = round(time.perf_counter() - start, 2)
    capacity = memory.pop("hbm_capacity_bytes", capacity)
    step_fits = memory["hbm_bytes_per_device"] <= capacity and "compiler_message" not in memory
    evaluation = _evaluation(config, placement, definition, known, capacity)
    reading = _reading(config, placement, known.get("frozen", 0))
    program = compiled and hlo.parse(compiled.as_text())
    if program:
        times |= seconds_to_send(program, topology)
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "mesh": mesh,
        "rows_per_device": config.training.batch_size
        / config.training.accumulate
        / (mesh["replica"] * mesh["fsdp"]),
        "tokens_per_step": config.training.batch_size * config.data.length,
        "fits": step_fits and evaluation["eval_fits"] is not False and reading <= capacity,
        "hbm_capacity_bytes": round(capacity),
        "reading_bytes_per_device": reading,
        **memory,
        **evaluation,
        "model_flops_per_step": round(bounds.model_flops(config)),
        "compile_seconds": compile_seconds,
        "step_seconds_at_least": times,
        "run_seconds_at_least": config.training.steps * max(times.values()),
        "bound_by": max(times, key=lambda name: times[name]),
        "program": program and counted(program, topology, _places(placement)),
        "xla": xla_options(config.compute, placement),
        "jax": jax.__version__,
        "compiler": _compiler(topology),
    }


def _places(placement: Placement) -> list[tuple[int, ...]] | None:
    """The coordinates of the mesh's devices, in order; None if they have none, as on GPUs."""
    devices = placement.mesh.devices.flat
    return [tuple(d.coords) for d in devices] if hasattr(devices[0], "coords") else None


def define(config: Config, placement: Placement) -> StateDef:
    """The definition of the run's state; raises the errors for its batches that the run would."""
    check_batches(config, placement)
    return define_state(config, placement)


def state_bytes(config: Config, placement: Placement) -> int:
    """Bytes of parameters and optimizer on a device, without compiling; raises as `define`."""
    return bytes_per_device(define(config, placement).placed)


class Foreseen(NamedTuple):
    """What is known of a step without compiling it.

    Attributes:
      state_bytes: bytes of parameters and optimizer on a device.
      step_seconds: the largest of the lower bounds of its time.
    """

    state_bytes: int
    step_seconds: float


def foresee(config: Config, placement: Placement, topology: Topology) -> Foreseen:
    """What is known of a step before it is compiled; raises as `define`."""
    definition = define(config, placement)
    times = _bounds(config, placement, topology, definition)
    return Foreseen(bytes_per_device(definition.placed), max(times.values()))


def _bounds(
    config: Config, placement: Placement, topology: Topology, definition: StateDef
) -> dict[str, float]:
    """Lower bounds of the step's time in seconds, by resource."""
    state, parameters = bytes_per_device(definition.placed), parameters_of(definition)
    mesh = dict(placement.mesh.shape)
    counted = bounds.traffic(config, mesh, topology.slices, parameters, state)
    return bounds.seconds(config, topology.devices, topology.chip, counted)


def abstract_batch(
    config: Config, placement: Placement, rows: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings of a batch of `jllama.data.pack`, as `put_batch` places it."""
    shape = (rows, config.data.length + 1)
    dtypes = {"tokens": jnp.int32, "segments": jnp.int32, "weights": jnp.float32}
    return {
        name: jax.ShapeDtypeStruct(
            shape, dtype, sharding=placement.sharding(shape, ("batch", None), name)
        )
        for name, dtype in dtypes.items()
    }


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree on one device, from shapes and shardings; all shards have the same size."""
    return math.ceil(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * _item(x) for x in jax.tree.leaves(tree))
    )


def _item(x: jax.ShapeDtypeStruct) -> float:
    """Bytes of an element; accelerators store two elements of 4 bits in one byte."""
    four_bits = x.dtype in (jnp.int4, jnp.uint4)
    return 0.5 if four_bits else x.dtype.itemsize


def parameters_of(definition: StateDef) -> list[bounds.Parameter]:
    """All parameters of a run, trained and frozen, for `bounds.traffic`."""

    def parameter(
        path: tuple[Any, ...], x: jax.ShapeDtypeStruct, trained: bool
    ) -> bounds.Parameter:
        parts = [(p,) if isinstance(p, str) else tuple(p or ()) for p in x.sharding.spec]
        item = None if trained else _item(x)
        return bounds.Parameter(dotted(path), x.shape, tuple(parts), trained, item)

    return [
        parameter(path, x, trained)
        for tree, trained in ((definition.placed.trainable, True), (definition.frozen, False))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _evaluation(
    config: Config,
    placement: Placement,
    definition: StateDef,
    known: dict[str, int],
    capacity: float,
) -> dict[str, Any]:
    """Bytes of an evaluation batch beside the whole state; None without held-out data."""
    if not config.data.held_out:
        return {"eval_hbm_bytes_per_device": None, "eval_fits": None}
    step = make_eval_step(config, functools.partial(causal_lm_loss, config), placement)
    batch = abstract_batch(config, placement, config.eval.batch_size)
    arguments = {key: known[key] for key in ("parameters", "frozen") if key in known}
    arguments["batch"] = bytes_per_device(batch)
    given = (definition.placed.trainable, definition.frozen, batch)
    memory, _ = _compiled(step, given, arguments)
    # The optimizer's state is no argument of the evaluation, so the compiler does not count it.
    need = memory["hbm_bytes_per_device"] + known["optimizer"]
    refused = memory.get("compiler_message")
    figures = {"eval_hbm_bytes_per_device": need, "eval_fits": need <= capacity and not refused}
    return figures | ({"eval_compiler_message": refused} if refused else {})


def _reading(config: Config, placement: Placement, frozen: int) -> int:
    """Peak bytes on a device while a base is read and quantised matrix by matrix; else 0."""
    kind = getattr(config.adapt, "quantize", "none")
    if kind == "none":
        return 0
    specs = jax.tree.leaves(param_specs(config.model, config.compute))
    matrices = [
        (leaf, spec.inputs)
        for leaf, spec in zip(jax.tree.leaves(base_shapes(config, placement)), specs, strict=True)
        if spec.inputs
    ]
    largest, inputs = max(matrices, key=lambda matrix: bytes_per_device(matrix[0]))
    program, quantized = quantizing(largest, inputs, kind)
    others = frozen - bytes_per_device(quantized)
    memory, _ = _compiled(program, (largest,), {})
    return others + memory["hbm_bytes_per_device"]


def _compiled(
    step: Any, given: tuple[Any, ...], known: dict[str, int]
) -> tuple[dict[str, Any], jax.stages.Compiled | None]:
    """A compiled step, or None if the compiler refuses it for its memory, and its bytes by kind.

    Those of the arguments come from their shapes, the others from the compiler.
    """
    lowered = step.lower(*given)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = out_of_memory(str(error))
        if refused is None:
            raise
        return _refused(refused, known), None
    stats = compiled.memory_analysis()
    arguments = stats.argument_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes  # that reuse no argument
    # Two upper bounds. temp_size counts some buffers of libtpu twice. The peak, which libtpu
    # compares with the HBM, includes on-chip memory, which matters for tiny models only.
    total = arguments + outputs + stats.temp_size_in_bytes
    total = min(total, getattr(stats, "peak_memory_in_bytes", 0) or total)
    kinds = known | {
        "padding": max(0, arguments - sum(known.values())),
        "temporaries": max(0, total - arguments),
        "program": stats.generated_code_size_in_bytes,
    }
    memory = {
        "hbm_bytes_per_device": sum(kinds.values()),
        "hbm_bytes_by_kind": kinds,
        "host_bytes_per_device": stats.host_temp_size_in_bytes + stats.host_argument_size_in_bytes,
    }
    return memory, compiled


def _refused(refused: dict[str, Any], known: dict[str, int]) -> dict[str, Any]:
    rest = max(0, refused["bytes"] - sum(known.values()))
    return {
        "hbm_bytes_per_device": refused["bytes"],
        "hbm_bytes_by_kind": known | {"temporaries": rest},
        "host_bytes_per_device": None,
        "hbm_capacity_bytes": refused["capacity"],
        "compiler_message": refused["message"],
    }


def out_of_memory(message: str) -> dict[str, Any] | None:
    """Reads the compiler's message that HBM is too small; None for any other message.

    Two forms are known: "the total memory required for HLO temporaries (16.16G) exceeds available
    HBM (15.75G)", which counts the arguments too, and "Used 20.17G of 15.75G hbm".
    """
    text = " ".join(message.split())
    sizes = re.search(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", text) or re.search(
        rf"Used {_SIZE} of {_SIZE} hbm", text
    )
    if "RESOURCE_EXHAUSTED" not in text or sizes is None:
        return None
    need, need_unit, have, have_unit = sizes.groups()
    sentence = re.search(r"[^.:]*\b(?:Ran out of memory|Used)\b.*?\.(?=\s|$)", text)
    return {
        "bytes": round(float(need) * _UNITS[need_unit]),
        "capacity": round(float(have) * _UNITS[have_unit]),
        "message": (sentence[0] if sentence else sizes[0]).strip(),
    }


def _compiler(topology: Topology) -> str:
    """The compiler's package and version; libtpu may be installed outside of the environment."""
    names = ("jax-cuda12-pjrt", "jax-cuda13-pjrt") if topology.on_gpu else ("libtpu",)
    library = Path(os.environ.get("TPU_LIBRARY_PATH", "/"))
    path = sys.path if topology.on_gpu else [str(library.parent.parent)]
    for package in importlib.metadata.distributions(path=path):
        if package.metadata["Name"] in names:
            return f"{package.metadata['Name']} {package.version}"
    return names[0]


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, because a compilation takes minutes."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> int:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # What libraries print on stdout goes to stderr: stdout is for the report.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    question = json.load(sys.stdin)
    config = recipes.validate(Config, question["config"], question["where"])
    try:
        answer = report(config, parse(question["topology"], question["slices"]))
    except UserError as error:
        answer = {"user_error": str(error)}
    except Exception as error:  # an error of the compiler or of tracing is the answer
        answer = {"failure": f"{type(error).__name__}: {error}"}
    json.dump(answer, stdout)
    stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
