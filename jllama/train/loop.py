"""Training a recipe: `train`, and the loop over steps.

The host dispatches step t, and while the devices compute it, records the metrics of step t - 1: it
waits for a step only after the next one is under way, so that the devices never wait for the host.
"""

import contextlib
import functools
import math
import time
from pathlib import Path

import jax

from jllama.chips import use_compilation_cache
from jllama.config import Config
from jllama.parallel import distributed
from jllama.store.find import CHECKPOINTS
from jllama.train.folder import advice, run_folder
from jllama.train.held_out import Left, evaluate
from jllama.train.report import Result, result
from jllama.train.run import Pending, RunState, Setup, end_step, prepare
from jllama.train.signals import noting_signals
from jllama.train.state import to_trees


def train(config: Config) -> Result:
    """Trains until the recipe's last step, SIGTERM, SIGINT or `run.stop_after`.

    Resumes when the run's folder holds a checkpoint. Raises `UserError` for bad input, for a folder
    that holds a run of another config, and for a loss that is not finite.

    Every process of a run calls it. A signal to one of them stops all of them at the same step; an
    error in one of them ends all of them, as `distributed.ending_together` says.
    """
    distributed.start(config.distributed)
    use_compilation_cache(config.run.compilation_cache)
    leaving = functools.partial(distributed.ending_together, lambda: advice(run_folder(config)))
    # The inner one ends this process before the stack waits for work that other processes share,
    # such as a checkpoint. The outer one is for errors that closing the stack raises.
    with leaving(), contextlib.ExitStack() as stack, leaving():
        with noting_signals() as received:
            setup, run = prepare(config, stack, received)
            take_steps(setup, run)
            held_out = finish(setup, run)
        return result(config, setup.folder, run.step, run.halt, held_out)


def take_steps(setup: Setup, run: RunState) -> None:
    """Trains until the last step or a signal, and saves where that ends."""
    config, end = setup.config, end_step(setup.config)
    while run.step < end and not run.halt:
        if run.profile.begins_at(run.step):
            record(setup, run)  # the trace begins with idle devices
            run.profile.start()
        take_step(setup, run)
        if run.profile.ends_at(run.step):
            jax.block_until_ready(run.train_state)
            run.profile.stop()
        if run.step < end and _is_due(run.step, config.checkpoint.every):
            save(setup, run)
        if run.step < config.training.steps and _is_due(run.step, config.eval.every):
            record(setup, run)
            evaluate_state(setup, run, max_rows=config.eval.max_rows)
            run.timed_from = time.perf_counter()  # the next step does not count the evaluation
    record(setup, run)
    if run.step > run.saved:
        save(setup, run)
    run.profile.stop()  # a signal came before the trace was complete


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def take_step(setup: Setup, run: RunState) -> None:
    """Dispatches the next step, and records the one before it."""
    before = time.perf_counter()
    step, batch = next(run.batches)
    assert step == run.step
    run.data_wait_seconds += time.perf_counter() - before
    vote = setup.vote(bool(run.received))
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
        run.train_state, metrics = setup.train_step(run.train_state, setup.frozen, batch)
    run.received.nothing_to_save = False
    record(setup, run)
    run.step += 1
    run.pending = Pending(run.step, metrics, vote)
    # A process alone need not wait for the vote to arrive.
    run.halt = run.halt or (bool(run.received) and not distributed.several())


def record(setup: Setup, run: RunState) -> None:
    """Waits for the pending step, takes over its vote as `run.halt`, and writes its metrics.

    Does nothing if no step is pending. Raises `UserError` when its loss or gradient is not finite,
    and writes no line then.
    """
    if run.pending is None:
        return
    (step, metrics, vote), run.pending = run.pending, None
    run.halt = run.halt or bool(vote)
    values = {name: float(x) for name, x in jax.device_get(metrics).items()}
    now = time.perf_counter()
    seconds = now - run.timed_from
    # What the devices computed: prompts and padding too, which are not predicted.
    tokens = setup.config.training.batch_size * setup.config.data.length
    rate = tokens / seconds
    values |= {
        "computed_tokens": tokens,
        "perplexity": math.exp(min(values["loss"], 700.0)),
        "seconds": seconds,
        "tokens_per_second": rate,
        "model_flop_utilisation": rate * setup.flops_per_token / setup.peak_flops,
        "data_wait_seconds": run.data_wait_seconds,
        "checkpoint_seconds": run.checkpoint_seconds,
    }
    run.timed_from, run.data_wait_seconds, run.checkpoint_seconds = now, 0.0, 0.0
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            advice = _after_divergence(setup.folder, run.saved)
            raise distributed.SharedError(f"step {step}: {name} is {values[name]}; {advice}")
    setup.metrics.write(step, values)


def _after_divergence(folder: Path, saved: int) -> str:
    again = "start again"
    if saved:
        again = (
            "start another run from a checkpoint that is still good: --run.name=NAME"
            f" --training.init_from={folder / CHECKPOINTS / str(saved)}"
        )
    return (
        f"{folder} stays at step {saved}; check the data, or lower training.schedule.peak and"
        f" {again}"
    )


def save(setup: Setup, run: RunState) -> None:
    """Starts to save a checkpoint, once its step is recorded and so known to be finite."""
    record(setup, run)
    before = time.perf_counter()
    setup.checkpoints.save(run.step, **to_trees(run.train_state))
    setup.metrics.sync()  # a resumed run finds the metrics of every step before the checkpoint
    run.saved, run.checkpoint_seconds = run.step, time.perf_counter() - before


def evaluate_state(
    setup: Setup, run: RunState, max_rows: int = 0, stride: int = 0
) -> dict[str, float] | None:
    """Evaluates the parameters of now on held-out rows, and writes the values; see `evaluate`.

    After a signal to any process the evaluation is left: then `run.halt` is set, and nothing is
    written.
    """
    try:
        values = evaluate(
            setup.config,
            setup.data,
            setup.placement,
            setup.eval_step,
            run.train_state.trainable,
            setup.frozen,
            max_rows=max_rows,
            stride=stride,
            vote=lambda: setup.vote(bool(run.received)),
        )
    except Left:
        run.halt, values = True, None
    if values is not None:
        setup.metrics.write_eval(run.step, values)
    return values


def finish(setup: Setup, run: RunState) -> dict[str, float] | None:
    """Evaluates a finished run, says how the run ended, and waits for the last checkpoint."""
    steps, held_out = setup.config.training.steps, None
    if setup.data.train.objective is not None:
        setup.metrics.say(setup.data.train.objective.report())
    if run.step == steps and not run.halt:
        held_out = evaluate_state(setup, run, stride=setup.config.eval.stride)
    if run.step < steps or run.halt:
        why = f"run.stop_after={setup.config.run.stop_after}: "
        if run.received:
            why = f"{run.received.signals[0].name}: "
        elif run.halt:
            why = "a signal to another process: "
        left = ", not evaluated" if run.step == steps else ""
        setup.metrics.say(f"{why}stopped at step {run.step} of {steps}, checkpointed{left}")
    setup.checkpoints.wait()  # signals are still noted: one must not end the process before this
    return held_out
