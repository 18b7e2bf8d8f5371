"""A run: from a recipe to a trained model in a folder, resumable at any checkpoint.

RUN/config.yaml  the resolved recipe      RUN/checkpoints/STEP  parameters, optimizer state
RUN/tokenizer.model                       RUN/metrics.jsonl, RUN/tensorboard
"""

import contextlib
import dataclasses
import functools
import json
import math
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jllama import recipe as recipes
from jllama import storage
from jllama.config import Config
from jllama.data.dataset import Data, eval_batches, open_data, open_tokenizer
from jllama.data.pack import CutRows
from jllama.errors import UserError
from jllama.flops import train_flops_per_token
from jllama.hardware import peak_flops, use_compilation_cache
from jllama.parallel.mesh import make_mesh
from jllama.parallel.sharding import Placement
from jllama.text.tokenizer import load_tokenizer
from jllama.train.checkpoint import Checkpoints
from jllama.train.loss import causal_lm_loss
from jllama.train.metrics import Metrics
from jllama.train.metrics import read as metrics_of
from jllama.train.mirror import Mirror
from jllama.train.state import define_state, init_state
from jllama.train.step import make_eval_step, make_train_step

# What may change between two runs in one folder: none of it changes what a step computes, but for
# the order of sums on another mesh.
_FREE = (
    "run.folder", "run.name", "run.log_every", "run.profile", "run.stop_after",
    "run.compilation_cache", "checkpoint.", "data.prefetch", "data.prepare.folder",
    "data.prepare.cache", "data.prepare.workers", "mesh.", "sharding.", "eval.", "sample.",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished or stopped run reports.

    Attributes:
      folder: the run's.
      steps: taken in all; `done` says whether that is the recipe's number.
      tokens, seconds: predicted tokens and training time of all steps, the first one's compilation
        included; tokens_per_second is the median step's.
      eval: held-out loss (nats per token) and bits_per_byte; None unless done and held out.
    """

    folder: Path
    steps: int
    done: bool
    tokens: int
    seconds: float
    tokens_per_second: float
    eval: dict[str, float] | None


def train(config: Config) -> Result:
    """Trains until the recipe's last step, SIGTERM, SIGINT or `run.stop_after`.

    Resumes when the folder holds a checkpoint. Raises `UserError` for bad input, a folder made
    from another config, or a loss that is not finite.
    """
    use_compilation_cache(config.run.compilation_cache)
    placement = Placement(make_mesh(config.mesh), config.sharding)
    definition = define_state(config, placement)
    folder = storage.path(config.run.folder) / config.run.name
    with storage.locked(folder, busy="another process trains here; choose another run.name"):
        checkpoints = Checkpoints(folder, config.checkpoint.keep)
        start = checkpoints.latest() or 0
        if start:
            _check_same_config(folder, config)
            tokenizer = load_tokenizer(folder)  # the run's own, whatever the recipe's is by now
            data = open_data(config, tokenizer)
            _check_same_data(folder, data)
            state = checkpoints.restore(start, definition)
        else:
            tokenizer = open_tokenizer(config)
            data = open_data(config, tokenizer)
            tokenizer.save(folder / "tokenizer.model")
            storage.write_text(folder / _DATA, json.dumps(_digests(data), indent=1))
            state = init_state(definition, config.run.seed)
        storage.write_text(folder / "config.yaml", recipes.to_yaml(config))
        metrics = Metrics(folder, start, config.training.steps, config.run.log_every)
        if start:
            metrics.say(f"resumed at step {start} of {config.training.steps}")
        run = _Run(config, placement, definition, data, checkpoints, metrics, folder)
        try:
            return run.go(state, start)
        finally:
            metrics.close()
            checkpoints.close()


class _Run:
    """The loop and what it needs."""

    def __init__(self, config, placement, definition, data, checkpoints, metrics, folder):
        self.config, self.placement, self.data = config, placement, data
        self.checkpoints, self.metrics, self.folder = checkpoints, metrics, folder
        loss = functools.partial(causal_lm_loss, config)
        self.step = make_train_step(config, loss, definition, placement)
        self.eval_step = make_eval_step(loss, placement)
        # What the evaluation needs is known before the training, not after it.
        placement.sharding((config.eval.batch_size,), ("batch",), "eval.batch_size")
        self.flops = train_flops_per_token(config.model, config.data.length)
        self.peak = peak_flops(config.compute.dtype)[0] * placement.mesh.size

    def go(self, state: Any, start: int) -> Result:
        config, last = self.config, self.config.training.steps
        end = min(last, config.run.stop_after or last)
        trace_from, trace_to = map(int, (config.run.profile or "-1:-1").split(":"))
        batches = self.data.train.iterate(start, prefetch=config.data.prefetch)
        saved, waiting, saving = start, 0.0, 0.0
        arrived = time.perf_counter()
        pending: tuple[int, dict] | None = None

        def fetch() -> None:
            """Writes the last step's metrics: a step late, so that the device never waits."""
            nonlocal pending, arrived, waiting, saving
            if pending is None:
                return
            (step, values), pending = pending, None
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
                    raise UserError(
                        f"step {step}: {name} is {values[name]}; lower training.schedule.peak or"
                        f" check the data; {self.folder} stays at step {saved}"
                    )
            self.metrics.write(step, values)

        def save(step: int) -> None:
            nonlocal saved, saving
            fetch()  # a state that is not finite is not kept
            before = time.perf_counter()
            self.metrics.sync()  # a resumed run has the lines of every step before it
            self.checkpoints.save(step, state)
            saved, saving = step, time.perf_counter() - before

        step, tracing = start, False
        with _stop_signal() as stopped:
            while step < end and not stopped:
                if step == trace_from:
                    fetch()
                    trace = Mirror(self.folder / "profile")
                    jax.profiler.start_trace(str(trace.local))
                    tracing = True
                before = time.perf_counter()
                at, batch = next(batches)
                assert at == step
                waiting += time.perf_counter() - before
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, values = self.step(state, (), self.placement.put_batch(batch))
                fetch()
                step += 1
                pending = (step, values)
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
                why = f"{stopped[0].name}: " if stopped else ""
                self.metrics.say(f"{why}stopped at step {step} of {last}, checkpointed")
            held_out = None
            if step == last:
                held_out = self.evaluate(state, 0, config.eval.stride)
                if held_out is not None:
                    self.metrics.write_eval(step, held_out)
            self.checkpoints.wait()  # before a signal may end the process again
        return self.result(step, held_out)

    def result(self, step: int, held_out: dict[str, float] | None) -> Result:
        """What metrics.jsonl says of the whole run, resumed or not."""
        lines = [x for x in metrics_of(self.folder / "metrics.jsonl") if "weight" in x]
        return Result(
            folder=self.folder,
            steps=step,
            done=step == self.config.training.steps,
            tokens=int(sum(x["weight"] for x in lines)),
            seconds=sum(x["seconds"] for x in lines),
            tokens_per_second=statistics.median(x["tokens_per_second"] for x in lines)
            if lines
            else 0.0,
            eval=held_out,
        )

    def evaluate(self, state: Any, max_rows: int, stride: int = 0) -> dict[str, float] | None:
        """Loss over all held-out sources, in nats per token, and their bits per byte of text."""
        nll = weight = bits = size = 0.0
        for name, prepared in self.data.held_out.items():
            rows = self.data.held_out_rows[name]
            if 0 < stride < rows.length and isinstance(rows, CutRows):
                rows = CutRows(prepared, self.config.data.length, stride=stride)
            here = [0.0, 0.0]
            for batch in eval_batches(rows, self.config.eval.batch_size, max_rows):
                out = self.eval_step(state.trainable, (), self.placement.put_batch(batch))
                here = [a + float(b) for a, b in zip(here, jax.device_get(out), strict=True)]
            if not here[1]:
                continue
            nll, weight = nll + here[0], weight + here[1]
            # A document's BOS is given, not predicted. Rows left out are taken to be like the rest.
            predicted = prepared.tokens - prepared.documents
            bits += here[0] / here[1] / math.log(2) * predicted
            size += prepared.bytes
        return {"loss": nll / weight, "bits_per_byte": bits / size} if weight else None


_DATA = "data.json"


def _digests(data: Data) -> dict[str, dict[str, str]]:
    """What the run's tokens are, by source."""
    parts = {"train": data.sources, "held_out": data.held_out}
    return {p: {name: x.digest for name, x in some.items()} for p, some in parts.items()}


def _check_same_data(folder: Path, data: Data) -> None:
    try:
        before = json.loads(storage.read_text(folder / _DATA))
    except (FileNotFoundError, ValueError) as e:
        raise UserError(f"{folder / _DATA}: not readable, the run's data is unknown: {e}") from None
    for part, digests in _digests(data).items():
        for name, digest in digests.items():
            if before[part].get(name, digest) != digest:
                raise UserError(
                    f"{folder}: the {part} source {name} is not the text that this run began with"
                    " (a changed file, or another Python's standard library); choose another"
                    " run.name or bring the text back"
                )


def _check_same_config(folder: Path, config: Config) -> None:
    old = recipes.load(folder / "config.yaml")
    before, after = flatten(recipes.to_dict(old)), flatten(recipes.to_dict(config))
    changed = [
        f"{key}: {before.get(key, 'absent')} there, {after.get(key, 'absent')} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, ...) != after.get(key, ...) and not key.startswith(_FREE)
    ]
    if changed:
        more = f" (and {len(changed) - 5} more)" if len(changed) > 5 else ""
        raise UserError(
            f"{folder} holds a run of another config: {'; '.join(changed[:5])}{more};"
            " choose another run.name or delete the folder"
        )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values as {dotted key: value}."""
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(x, dict) for x in tree):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {
        k: v for key, value in items
        for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }  # fmt: skip


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
