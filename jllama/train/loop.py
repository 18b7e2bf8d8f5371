"""A run: from a recipe to a trained model in its folder, resumable at any checkpoint."""

import contextlib
import dataclasses
import functools
import math
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jllama.adapt.lora import adapted_flops_per_token, without_whole
from jllama.chips import peak_flops, use_compilation_cache
from jllama.config import Config, LoraConfig, ReplyObjective
from jllama.data.dataset import eval_batches
from jllama.data.pack import CutRows
from jllama.files import storage
from jllama.files.mirror import Mirror
from jllama.flops import parameter_count
from jllama.parallel import distributed
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.progress import say
from jllama.store.adapter import note_base
from jllama.store.checkpoint import Checkpoints
from jllama.store.find import latest_step
from jllama.store.model import read_base
from jllama.train import folder as run_folder
from jllama.train.initial import open_initial
from jllama.train.loss import causal_lm_loss
from jllama.train.metrics import MetricsWriter, NoMetricsWriter
from jllama.train.metrics import read as metrics_of
from jllama.train.state import (
    StateDef,
    base_shapes,
    check_batches,
    define_state,
    freezer,
    from_trees,
    init_state,
    start_from,
    to_trees,
)
from jllama.train.step import make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished or stopped run reports.

    Attributes:
      folder: the run's.
      steps: taken in all; `done` says whether that is the recipe's number.
      stopped: whether a signal ended it early, in this process or in another.
      tokens, seconds: predicted tokens and training time of all steps, the first one's compilation
        included; tokens_per_second is the median step's.
      eval: held-out loss (nats per token) and, but of replies, bits_per_byte; None unless done and
        held out.
    """

    folder: Path
    steps: int
    done: bool
    stopped: bool
    tokens: int
    seconds: float
    tokens_per_second: float
    eval: dict[str, float] | None


def train(config: Config) -> Result:
    """Trains until the recipe's last step, SIGTERM, SIGINT or `run.stop_after`.

    Resumes when the folder holds a checkpoint. Raises `UserError` for bad input, a folder made
    from another config, or a loss that is not finite.

    With several processes, all call it; a signal to one of them stops all at the same step. Ends
    the process as `ending_together` says when one of them fails.
    """
    distributed.start(config.distributed)
    use_compilation_cache(config.run.compilation_cache)
    folder = storage.path(config.run.folder) / config.run.name
    leaving = functools.partial(distributed.ending_together, lambda: run_folder.advice(folder))
    # The inner one leaves before the stack waits for what the other processes have part in, such
    # as a checkpoint; the outer one hears what the stack meets.
    with leaving(), contextlib.ExitStack() as stack, leaving():
        return _train(config, folder, stack)


def _train(config: Config, folder: Path, stack: contextlib.ExitStack) -> Result:
    together, leader = distributed.together, distributed.leader()
    distributed.check_same(
        "the recipe", run_folder.told_alike(config), "start all with the same arguments"
    )
    placement = together(lambda: Placement(make_mesh(config.mesh), config.sharding))
    together(lambda: check_batches(config, placement))
    definition = together(lambda: define_state(config, placement))
    adapts = isinstance(config.adapt, LoraConfig)  # its base is no part of a checkpoint
    begins = together(lambda: adapts or not latest_step(folder))
    initial = together(lambda: open_initial(config) if begins else None)
    known = initial.tokenizer if initial else None
    # The leader makes what is missing while the others wait; they find it, or make their own
    # where prepared data is not on shared storage.
    data = together(lambda: run_folder.begin(config, folder, stack, known) if leader else None)
    data = together(lambda: data or run_folder.join(config, folder))
    distributed.check_same("the prepared text", run_folder.digests(data), "give all the same files")
    checkpoints = together(lambda: Checkpoints(folder, config.checkpoint.keep))
    stack.callback(checkpoints.close)
    start = checkpoints.latest() or 0
    distributed.check_same("the newest checkpoint", str(start), "run.folder must be shared storage")
    if leader:
        say(_opening(config, placement, definition, folder, start))
    base = frozen = ()
    given = None  # what the training goes on from
    if adapts:
        places = base_shapes(config, placement)
        base, digest = read_base(initial, places, freezer(config))
        where = str(storage.absolute(initial.place))
        together(lambda: note_base(folder, where, digest) if leader else None)
        for adapter in initial.adapters.values() if not start else ():
            _, given = adapter.read(config.model, placement, base, digest)
        frozen = without_whole(base, definition.shapes.trainable)
    elif initial and not start:
        given = initial.read(definition.placed.trainable)
    if start:
        state = from_trees(checkpoints.restore(start, **to_trees(definition.placed)))
    elif given is not None:
        state = start_from(definition, given)
    else:
        state = init_state(definition, config.run.seed, base)
    del base, given
    steps, every = config.training.steps, config.run.log_every
    metrics = MetricsWriter(folder, start, steps, every) if leader else NoMetricsWriter()
    stack.callback(metrics.close)
    if start:
        metrics.say(f"resumed at step {start} of {steps}")
    run = together(
        lambda: _Run(config, placement, definition, frozen, data, checkpoints, metrics, folder)
    )
    return run.go(state, start)


def _opening(
    config: Config, placement: Placement, definition: StateDef, folder: Path, start: int
) -> str:
    """What runs, on what, and when it is safe: the line before the long silence of a compiler."""
    steps, every = config.training.steps, config.checkpoint.every
    sizes = [f"{axis}={n}" for axis, n in placement.mesh.shape.items() if n > 1]
    count, processes = placement.mesh.size, jax.process_count()
    trained = sum(x.size for x in jax.tree.leaves(definition.shapes.trainable))
    return "".join(
        [
            f"{folder}: {parameter_count(config.model):,} parameters",
            f", {trained:,} trained over them" if definition.frozen else "",
            f" on {count} {placement.platform} device{'s' * (count > 1)}",
            f" of {processes} processes" if processes > 1 else "",
            f", mesh {' '.join(sizes)}" if sizes else "",
            f"; a checkpoint every {every} steps"
            if 0 < every < steps
            else f"; no checkpoint before the end (checkpoint.every={every})",
            "; compiling the first step" if start < steps else "",
        ]
    )


class _Run:
    """The loop and what it needs."""

    def __init__(self, config, placement, definition, frozen, data, checkpoints, metrics, folder):
        self.config, self.placement, self.frozen, self.data = config, placement, frozen, data
        self.checkpoints, self.metrics, self.folder = checkpoints, metrics, folder
        loss = functools.partial(causal_lm_loss, config)
        self.step = make_train_step(config, loss, definition, placement)
        self.eval_step = make_eval_step(loss, placement)
        self.rows = placement.batch_rows(config.training.batch_size, "training.batch_size")
        # What the evaluation needs is known before the training, not after it.
        if config.data.held_out:
            self.eval_rows = placement.batch_rows(config.eval.batch_size, "eval.batch_size")
        self.flops = adapted_flops_per_token(config.model, config.adapt, config.data.length)
        # Only the leader reports, and measures where no figure is published.
        peak = peak_flops(config.compute.dtype)[0] if distributed.leader() else math.inf
        self.peak = peak * placement.mesh.size
        self.vote = distributed.Vote()

    def go(self, state: Any, start: int) -> Result:
        config, last = self.config, self.config.training.steps
        end = min(last, config.run.stop_after or last)
        trace_from, trace_to = map(int, (config.run.profile or "-1:-1").split(":"))
        batches = self.data.train.iterate(start, self.rows, config.data.prefetch)
        saved, waiting, saving = start, 0.0, 0.0
        arrived = time.perf_counter()
        pending: tuple[int, dict, Any] | None = None
        halt = False  # a signal came to this process, or to any: known a step late, and to all

        def fetch() -> None:
            """Writes the last step's metrics: a step late, so that the device never waits."""
            nonlocal pending, arrived, waiting, saving, halt
            if pending is None:
                return
            (step, values, vote), pending = pending, None
            halt = halt or bool(vote)
            values = {k: float(v) for k, v in jax.device_get(values).items()}
            now = time.perf_counter()
            rate = values["weight"] / (now - arrived)
            values |= {
                "perplexity": math.exp(min(values["loss"], 700.0)),
                "seconds": now - arrived,
                "tokens_per_second": rate,
                "model_flop_utilisation": rate * self.flops / self.peak,
                "data_wait_seconds": waiting,
                "checkpoint_seconds": saving,
            }
            arrived, waiting, saving = now, 0.0, 0.0
            for name in ("loss", "grad_norm"):
                if not math.isfinite(values[name]):
                    raise distributed.SharedError(
                        f"step {step}: {name} is {values[name]}; lower training.schedule.peak or"
                        f" check the data; {self.folder} stays at step {saved}"
                    )
            self.metrics.write(step, values)

        def save(step: int) -> None:
            nonlocal saved, saving
            fetch()  # a state that is not finite is not kept
            before = time.perf_counter()
            self.checkpoints.save(step, **to_trees(state))
            self.metrics.sync()  # a resumed run has the lines of every step before it
            saved, saving = step, time.perf_counter() - before

        step, tracing = start, False
        with _stop_signal() as stopped:
            while step < end and not halt:
                if step == trace_from and distributed.leader():
                    fetch()
                    trace = Mirror(self.folder / "profile")
                    jax.profiler.start_trace(str(trace.local))
                    tracing = True
                before = time.perf_counter()
                at, batch = next(batches)
                assert at == step
                waiting += time.perf_counter() - before
                vote = self.vote(bool(stopped))
                batch = self.placement.put_batch(batch, config.training.batch_size)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, values = self.step(state, self.frozen, batch)
                fetch()
                step += 1
                pending = (step, values, vote)
                halt = halt or (bool(stopped) and not distributed.several())
                if tracing and step in (trace_to, end):
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                    trace.close()
                    tracing = False
                every = config.checkpoint.every
                if step < end and every and step % every == 0:
                    save(step)
                every = config.eval.every
                if step < last and every and step % every == 0:
                    fetch()
                    held_out = self.evaluate(state, config.eval.max_rows)
                    if held_out is not None:
                        self.metrics.write_eval(step, held_out)
                    arrived = time.perf_counter()  # not the next step's time
            fetch()
            if step > saved:
                save(step)
            if tracing:
                jax.profiler.stop_trace()
                trace.close()
            if step < last:
                why = "a signal to another process: " if halt else ""
                why = f"{stopped[0].name}: " if stopped else why
                self.metrics.say(f"{why}stopped at step {step} of {last}, checkpointed")
            if self.data.train.objective is not None:
                self.metrics.say(self.data.train.objective.report())
            held_out = None
            if step == last:
                held_out = self.evaluate(state, 0, config.eval.stride)
                if held_out is not None:
                    self.metrics.write_eval(step, held_out)
            self.checkpoints.wait()  # before a signal may end the process again
        return self.result(step, step < end, held_out)

    def result(self, step: int, stopped: bool, held_out: dict[str, float] | None) -> Result:
        """What metrics.jsonl says of the whole run, resumed or not."""
        lines = [x for x in metrics_of(self.folder / "metrics.jsonl") if "weight" in x]
        return Result(
            folder=self.folder,
            steps=step,
            done=step == self.config.training.steps,
            stopped=stopped,
            tokens=int(sum(x["weight"] for x in lines)),
            seconds=sum(x["seconds"] for x in lines),
            tokens_per_second=statistics.median(x["tokens_per_second"] for x in lines)
            if lines
            else 0.0,
            eval=held_out,
        )

    def evaluate(self, state: Any, max_rows: int, stride: int = 0) -> dict[str, float] | None:
        """Loss over all held-out sources, in nats per token, and their bits per byte of text.

        No bits per byte where prompts are not predicted: bytes are counted of whole texts.
        """
        nll = weight = bits = size = 0.0
        for name, prepared in self.data.held_out.items():
            rows = self.data.held_out_rows[name]
            if 0 < stride < rows.length and isinstance(rows, CutRows):
                rows = CutRows(prepared, self.config.data.length, stride=stride)
            here = [0.0, 0.0]
            wide = self.config.eval.batch_size
            for batch in eval_batches(rows, wide, max_rows, self.eval_rows):
                batch = self.placement.put_batch(batch, wide)
                out = self.eval_step(state.trainable, self.frozen, batch)
                here = [a + float(b) for a, b in zip(here, jax.device_get(out), strict=True)]
            if not here[1]:
                continue
            nll, weight = nll + here[0], weight + here[1]
            # A document's BOS is given, not predicted. Rows left out are taken to be like the rest.
            predicted = prepared.tokens - prepared.documents
            bits += here[0] / here[1] / math.log(2) * predicted
            size += prepared.bytes
        if not weight:
            return None
        replies = isinstance(self.config.data.objective, ReplyObjective)
        return {"loss": nll / weight} | ({} if replies else {"bits_per_byte": bits / size})


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[signal.Signals]]:
    """A list that is empty until SIGTERM or SIGINT comes; a second SIGINT interrupts at once."""
    came: list[signal.Signals] = []

    def note(number, frame):
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(signal.Signals(number))

    try:
        old = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: the caller's business
        yield came
        return
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
