"""Preparing as an Apache Beam pipeline (extra `beam`): the bytes of `prepare`, on any runner.

Tokens are never shuffled, so nothing is sorted and no shard is ever in memory:

1. A task reads some parts of the source in order, tokenises them, and writes one object, its run:
   the documents j = r, r + S, r + 2S, ... of the task for each r below S, the number of shards.
2. Once every run is there, a task per logical shard knows how many documents came before each run,
   and so which r of it is its own: it reads that range of every run, in order, and packs it.

A worker holds one chunk of text, or the tokens that one run has for one shard; on its disk, one run
or one shard. Parts are whole files (of TFDS, ranges of examples): a source in one file is one task.
"""

import dataclasses
import itertools
import json
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from jllama.config import PrepareConfig, Source, SourceConfig
from jllama.data import source as sources
from jllama.data import worker
from jllama.data.prepare import chunks, finish, wipe
from jllama.data.records import ShardCounts, ShardWriter, ends_file, records_file
from jllama.errors import UserError
from jllama.files import storage
from jllama.progress import say
from jllama.text.tokenizer import Tokenizer

RUNNERS = {
    # Beam's own DirectRunner would first download and try another one, Prism.
    "direct": "apache_beam.runners.portability.fn_api_runner.fn_runner.FnApiRunner",
    "dataflow": "DataflowRunner",
    "flink": "FlinkRunner",
    "spark": "SparkRunner",
}
_TASK_BYTES = 64_000_000  # source that is worth a task
_RUNS = "beam"  # folder in the dataset's, gone when it is whole


@dataclasses.dataclass(frozen=True)
class Run:
    """What a task found.

    Attributes:
      number: the task's; runs in this order are the source.
      documents, text_bytes: usable ones, and their UTF-8 bytes.
      bad: (where, reason) of those that are not, up to one more than may be skipped.
      error: why the task ended early; empty if it did not.
    """

    number: int
    documents: int
    text_bytes: int
    bad: tuple[tuple[str, str], ...] = ()
    error: str = ""


def maker(runner: str, options: dict[str, object]) -> Callable[..., None]:
    """The `make` of `jllama.data.prepare.prepare` on a runner, with Beam's pipeline options."""

    def make(
        folder: Path,
        key: dict,
        source: SourceConfig,
        tokenizer: Tokenizer,
        config: PrepareConfig,
    ) -> None:
        if runner == "dataflow" and not storage.is_remote(folder):
            raise UserError(
                f"{folder}: Dataflow's workers share no disk with this machine; set"
                " data.prepare.folder to gs:// or s3://"
            )
        inputs = sources.source_files(source.source)
        runs = folder / _RUNS
        wipe(folder)
        storage.make_folder(runs)
        try:
            tasks = list(_tasks(sources.parts(source.source)))
            _pipeline(runner, options, tasks, folder, source.source, tokenizer, config)
            found = [Run(**_load(runs / f"run-{i:05d}.json")) for i in range(len(tasks))]
            skipped = _report(source.source, found, config.max_skipped)
            shards = [
                ShardCounts(**_load(runs / f"shard-{i:05d}.json")) for i in range(config.shards)
            ]
            text_bytes = sum(run.text_bytes for run in found)
            finish(folder, folder, key, source, tokenizer, inputs, shards, text_bytes, skipped)
        finally:
            storage.remove_folder(runs)

    return make


def _tasks(parts: list) -> Iterator[tuple[int, list]]:
    """(number, consecutive parts) of about `_TASK_BYTES`."""
    number, some, size = 0, [], 0
    for part in parts:
        some.append(part)
        # Examples of TFDS: what they weigh is not known, and a range of them is a task.
        size += _TASK_BYTES if isinstance(part, range) else part.size
        if size >= _TASK_BYTES:
            yield number, some
            number, some, size = number + 1, [], 0
    if some:
        yield number, some


def _pipeline(runner, options, tasks, folder, source, tokenizer, config) -> None:
    if runner == "direct":
        options = {"direct_num_workers": config.workers, **options}
        if str(options["direct_num_workers"]) != "1":
            options = {"direct_running_mode": "multi_processing", **options}
    given = PipelineOptions.from_dictionary(options)
    tokenise, pack = _Tokenise(source, tokenizer, folder, config), _Pack(tokenizer, folder, config)
    try:
        with beam.Pipeline(runner=RUNNERS[runner], options=given) as pipeline:
            runs = (
                pipeline
                | "parts" >> beam.Create(tasks)
                | "spread parts" >> beam.Reshuffle()
                | "tokenise" >> beam.ParDo(tokenise)
            )
            _ = (
                pipeline
                | "shards" >> beam.Create(range(config.shards))
                | "spread shards" >> beam.Reshuffle()
                | "pack" >> beam.ParDo(pack, beam.pvalue.AsList(runs))
            )
    except Exception as e:  # runners raise what they like, mostly a worker's traceback as text
        lines = [line for line in str(e).splitlines() if line.strip()]
        raise UserError(f"--runner {runner}: {lines[-1] if lines else type(e).__name__}") from e


class _Tokenise(beam.DoFn):
    """(number, parts) -> Run, and the run's object."""

    def __init__(self, source: Source, tokenizer, folder: Path, config: PrepareConfig):
        self._source, self._tokenizer, self._config = source, tokenizer, config
        self._folder = str(folder)

    def process(self, task):
        number, parts = task
        runs = storage.path(self._folder) / _RUNS
        shards, most = self._config.shards, self._config.max_skipped
        bad: list[tuple[str, str]] = []
        documents = text_bytes = 0
        lengths = [array("I") for _ in range(shards)]
        error = ""

        def texts() -> Iterator[str]:
            for part in parts:
                for where, text in sources.read(self._source, part):
                    if isinstance(text, sources.Skipped):
                        bad.append((where, str(text)))
                        if len(bad) > most:
                            return
                    else:
                        yield text

        with tempfile.TemporaryDirectory(prefix="jllama-run-") as work:
            pieces = [open(Path(work, str(r)), "wb") for r in range(shards)]  # noqa: SIM115
            try:
                for chunk in chunks(texts()):
                    tokens, counts, size = worker.encode(self._tokenizer, chunk)
                    tokens = tokens.astype(tokens.dtype.newbyteorder("<"))
                    at = 0
                    for n in counts:
                        pieces[documents % shards].write(tokens[at : at + n].tobytes())
                        lengths[documents % shards].append(n)
                        documents, at = documents + 1, at + n
                    text_bytes += size
            except UserError as e:
                error = str(e)
            finally:
                for piece in pieces:
                    piece.close()
            run = Path(work, "run")
            _join(run, [Path(piece.name) for piece in pieces], lengths)
            storage.copy_file(run, runs / f"run-{number:05d}")
        found = Run(number, documents, text_bytes, tuple(bad), error)
        storage.write_text(runs / f"run-{number:05d}.json", json.dumps(dataclasses.asdict(found)))
        yield found


class _Pack(beam.DoFn):
    """A logical shard's number -> its files in the dataset's folder, and its counts beside."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, config: PrepareConfig):
        self._vocab_size, self._config, self._folder = tokenizer.vocab_size, config, str(folder)

    def process(self, shard, runs: list[Run]):
        runs = sorted(runs, key=lambda run: run.number)
        bad = sum(len(run.bad) for run in runs)
        if bad > self._config.max_skipped or any(run.error for run in runs):
            return  # the error is for whoever started the pipeline to raise
        folder, dtype = storage.path(self._folder), worker.token_dtype(self._vocab_size)
        with tempfile.TemporaryDirectory(prefix="jllama-shard-") as work:
            writer = ShardWriter(Path(work), shard, self._vocab_size, self._config)
            before = 0
            for run in runs:
                file = folder / _RUNS / f"run-{run.number:05d}"
                lengths, tokens = _piece(
                    file, run.documents, self._config.shards, shard - before, dtype
                )
                at = 0
                for n in lengths.tolist():
                    writer.add(tokens[at : at + n])
                    at += n
                before += run.documents
            counts = writer.close()
            for name in (records_file(shard, self._config.shards), ends_file(shard)):
                storage.copy_file(Path(work, name), folder / name)
        text = json.dumps(dataclasses.asdict(counts))
        storage.write_text(folder / _RUNS / f"shard-{shard:05d}.json", text)


def _join(run: Path, pieces: list[Path], lengths: list[array]) -> None:
    """A run: int64 [S+1] where each piece's tokens begin, uint32 lengths, tokens; little-endian."""
    tokens = [0, *itertools.accumulate(sum(some) for some in lengths)]
    with open(run, "wb") as file:
        file.write(np.array(tokens, "<i8").tobytes())
        for some in lengths:
            file.write(np.array(some, "<u4").tobytes())
        for piece in pieces:
            with open(piece, "rb") as opened:
                while data := opened.read(1 << 20):
                    file.write(data)


def _piece(
    file: Path, documents: int, shards: int, shard: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, tokens joined) of a run's documents `shard`, `shard` + S, ... modulo S."""
    r = shard % shards
    head = 8 * (shards + 1)
    start, stop = np.frombuffer(storage.read_range(file, 8 * r, 8 * r + 16), "<i8").tolist()
    first = sum(len(range(q, documents, shards)) for q in range(r))
    last = first + len(range(r, documents, shards))
    lengths = storage.read_range(file, head + 4 * first, head + 4 * last)
    base, size = head + 4 * documents, dtype.itemsize
    tokens = storage.read_range(file, base + size * start, base + size * stop)
    return np.frombuffer(lengths, "<u4"), np.frombuffer(tokens, dtype.newbyteorder("<"))


def _report(source: Source, runs: list[Run], most: int) -> int:
    """Reports what was skipped, in the source's order, as `jllama.data.source.documents` does."""
    skipped = 0
    for run in runs:
        for where, reason in run.bad:
            say(sources.skip(where, reason, skipped, most))
            skipped += 1
        if run.error:
            raise UserError(run.error)
    if not sum(run.documents for run in runs):
        raise sources.no_documents(source)
    return skipped


def _load(file: Path) -> dict:
    return json.loads(storage.read_text(file))
