"""A run: what it works with, its state between two steps, and how both are prepared."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jllama.adapt.lora import adapted_flops_per_token
from jllama.chips import peak_flops
from jllama.config import Config, LoraConfig
from jllama.data.opening import Data
from jllama.parallel import distributed
from jllama.parallel.sharding import Placement
from jllama.progress import say
from jllama.store.checkpoint import Checkpoints
from jllama.store.find import latest_step
from jllama.train.batches import Batches
from jllama.train.branch import open_branch
from jllama.train.compiler import as_text, with_options, xla_options
from jllama.train.folder import check_same_recipe, open_run, run_folder
from jllama.train.initial import open_initial
from jllama.train.loss import Batch, causal_lm_loss
from jllama.train.metrics import MetricsWriter, NoMetricsWriter
from jllama.train.origin import is_elsewhere
from jllama.train.placement import make_placement
from jllama.train.profile import Profile
from jllama.train.report import opening_line
from jllama.train.signals import Received
from jllama.train.start import start_state
from jllama.train.state import TrainState, define_state
from jllama.train.step import EvalStep, StepMetrics, TrainStep, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run works with. The attributes are set once; some are objects with their own state.

    Attributes:
      config: the recipe.
      folder: run.folder/run.name.
      placement: the mesh, and where arrays lie on it.
      data: the prepared text, as rows to train on and rows that are held out.
      frozen: the parameters that the step reads and does not train; () where it trains all.
      train_step, eval_step: the jitted functions.
      checkpoints: saves the state while training goes on.
      metrics: writes metrics in process 0, and nothing in the others.
      vote: tells every process whether any of them has received a signal.
      flops_per_token: model FLOPs of training on one token.
      peak_flops: FLOP/s of all devices together; infinite except in process 0, which reports.
    """

    config: Config
    folder: Path
    placement: Placement
    data: Data
    frozen: Any
    train_step: TrainStep
    eval_step: EvalStep
    checkpoints: Checkpoints
    metrics: MetricsWriter | NoMetricsWriter
    vote: distributed.Vote
    flops_per_token: float
    peak_flops: float


class Pending(NamedTuple):
    """A dispatched step whose metrics are not written yet.

    Attributes:
      step: the number of steps taken, this one included.
      metrics: what the train step returned.
      vote: more than 0 if a process had received a signal before this step.
    """

    step: int
    metrics: StepMetrics
    vote: jax.Array | bool


@dataclasses.dataclass
class RunState:
    """The state of a run between two steps. The functions of `jllama.train.loop` change it, and the
    handler of signals notes them in `received`.

    Attributes:
      batches: the placed batches from `step` on, in order.
      profile: the trace of some steps.
      train_state: the parameters and the optimizer's state; devices may still be computing it.
      step: how many steps have been dispatched, those of earlier runs in the folder included.
      saved: the newest step whose save has begun; 0 if there is none.
      pending: the last dispatched step, until its metrics are written.
      received: the signals to stop that this process has received.
      halt: whether to stop before the next step because some process received a signal. All
        processes find that out while they record the same step.
      timed_from: when the time of the next recorded step began, by time.perf_counter().
      data_wait_seconds: time since `timed_from` spent waiting for batches.
      checkpoint_seconds: time since `timed_from` spent in the last save.
    """

    batches: Iterator[tuple[int, Batch]]
    profile: Profile
    train_state: TrainState
    step: int
    saved: int
    received: Received
    pending: Pending | None = None
    halt: bool = False
    timed_from: float = dataclasses.field(default_factory=time.perf_counter)
    data_wait_seconds: float = 0.0
    checkpoint_seconds: float = 0.0


def end_step(config: Config) -> int:
    """The step after which this call of `train` stops: the recipe's last, or `run.stop_after`."""
    return min(config.training.steps, config.run.stop_after or config.training.steps)


def prepare(
    config: Config, stack: contextlib.ExitStack, received: Received
) -> tuple[Setup, RunState]:
    """Opens all that a run needs; `stack` closes it. Every process calls this.

    Raises `UserError` for bad input, before anything is written where that can be known.
    """
    together, leader, folder = distributed.together, distributed.leader(), run_folder(config)
    check_same_recipe(config)
    placement = together(lambda: make_placement(config))
    config = together(lambda: with_options(config, placement))
    definition = together(lambda: define_state(config, placement))
    # A resumed run does not read again what it began with, except to compare what has moved, and
    # the base of an overlay, which is in no checkpoint.
    reads = together(lambda: not latest_step(folder) or is_elsewhere(folder, config))
    branch = together(lambda: open_branch(config) if reads else None)
    reads_initial = isinstance(config.adapt, LoraConfig) or (reads and branch is None)
    initial = together(lambda: open_initial(config) if reads_initial else None)
    begun = None if branch else initial
    _, data = stack.enter_context(open_run(config, initial=begun, branch=branch))
    checkpoints = together(lambda: Checkpoints(folder, config.checkpoint.keep))
    stack.callback(checkpoints.close)
    saved = checkpoints.latest() or 0
    distributed.check_same("the newest checkpoint", str(saved), "run.folder must be shared storage")
    step = branch.step if branch and not saved else saved
    if leader:
        say(opening_line(config, placement, definition, folder, step))
        if options := xla_options(config.compute, placement):
            say(f"{folder}: options of XLA: {as_text(options)}")
    profile = Profile(config.run.profile, end_step(config), folder)
    if leader and (note := profile.note(step)):
        say(note)
    state, frozen = start_state(config, placement, definition, folder, saved, initial, branch)
    steps, every = config.training.steps, config.run.log_every
    metrics = MetricsWriter(folder, step, steps, every) if leader else NoMetricsWriter()
    stack.callback(metrics.close)
    if step:
        source = "" if saved else f" from {branch}"
        metrics.say(f"resumed{source} at step {step} of {steps}")
    loss = functools.partial(causal_lm_loss, config)
    # Only process 0 reports, and measures the peak where none is published.
    peak = peak_flops(config.compute.dtype)[0] if leader else math.inf
    setup = Setup(
        config=config,
        folder=folder,
        placement=placement,
        data=data,
        frozen=frozen,
        train_step=make_train_step(config, loss, definition, placement),
        eval_step=make_eval_step(config, loss, placement),
        checkpoints=checkpoints,
        metrics=metrics,
        vote=distributed.Vote(),
        flops_per_token=adapted_flops_per_token(config.model, config.adapt, config.data.length),
        peak_flops=peak * placement.mesh.size,
    )
    return setup, RunState(
        batches=Batches(config, data, placement).iterate(step),
        profile=profile,
        train_state=state,
        step=step,
        saved=saved,
        received=received,
    )
