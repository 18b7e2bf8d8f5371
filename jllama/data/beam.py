"""Prepares a source with an Apache Beam pipeline (extra `beam`), on any runner.

The dataset has the same bytes as one that `prepare` makes in processes. Tokens are never shuffled,
so nothing has to be sorted, and no shard is ever whole in memory:

1. A task reads some parts of the source in order, tokenises them, and writes one object, its run.
   With S logical shards a run has S pieces; piece r holds the documents r, r + S, r + 2S, ... of
   the task.
2. Once all runs exist, one task per logical shard counts the documents before each run. The count
   tells which piece of the run belongs to the shard. The task reads that piece of every run, in
   order, and packs it.

A worker holds in memory one chunk of text, or one piece of a run, and on its disk one run or one
shard. The parts of a source are whole files (of a TFDS dataset, ranges of examples), so a source
with a single file is a single task.
"""

import dataclasses
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from jllama.config import PrepareConfig, Source, SourceConfig
from jllama.data import source as sources
from jllama.data import worker
from jllama.data.prepare import CHUNK_CHARACTERS, finish, grouped, wipe
from jllama.data.records import ShardCounts, ShardWriter, documents_file, records_file
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
_TASK_BYTES = 64_000_000  # of the source, in one task
_RUNS = "beam"  # folder of the runs, within the dataset's until that is whole


@dataclasses.dataclass(frozen=True)
class Run:
    """What a task has read.

    Attributes:
      number: the number of the task; the runs in this order are the source.
      documents, text_bytes: the number of usable documents and of their UTF-8 bytes.
      bad: (place, reason) of the unusable documents, up to one more than may be skipped.
      error: why the task ended early, or empty.
    """

    number: int
    documents: int
    text_bytes: int
    bad: tuple[tuple[str, str], ...] = ()
    error: str = ""


def make(
    runner: str,
    options: dict[str, object],
    folder: Path,
    key: dict,
    source: SourceConfig,
    tokenizer: Tokenizer,
    config: PrepareConfig,
) -> None:
    """With its first two arguments, the `make` of `jllama.data.prepare.prepare`.

    `options` are Beam's pipeline options.
    """
    if runner == "dataflow" and not storage.is_remote(folder):
        raise UserError(
            f"{folder}: Dataflow's workers share no disk with this machine; set"
            " data.prepare.folder to a gs:// or s3:// URL"
        )
    inputs = sources.source_files(source.source)
    runs = folder / _RUNS
    wipe(folder)
    storage.make_folder(runs)
    try:
        parts = sources.parts(source.source)
        tasks = list(enumerate(grouped(parts, _part_bytes, _TASK_BYTES)))
        _pipeline(runner, options, tasks, folder, source.source, tokenizer, config)
        done = [Run(**storage.read_json(runs / f"run-{i:05d}.json")) for i in range(len(tasks))]
        skipped = _report(source.source, done, config.max_skipped)
        shards = [
            ShardCounts(**storage.read_json(runs / f"shard-{i:05d}.json"))
            for i in range(config.shards)
        ]
        text_bytes = sum(run.text_bytes for run in done)
        finish(folder, folder, key, source, tokenizer, inputs, shards, text_bytes, skipped)
    finally:
        storage.remove_folder(runs)


def _part_bytes(part: sources.SourceFile | range) -> int:
    # The size of a range of examples is unknown; each range is a task of its own.
    return _TASK_BYTES if isinstance(part, range) else part.size


def _pipeline(runner, options, tasks, folder, source, tokenizer, config) -> None:
    if runner == "direct":
        options = {"direct_num_workers": config.workers, **options}
        if str(options["direct_num_workers"]) != "1":
            options = {"direct_running_mode": "multi_processing", **options}
    pipeline_options = PipelineOptions.from_dictionary(options)
    tokenise, pack = _Tokenise(source, tokenizer, folder, config), _Pack(tokenizer, folder, config)
    try:
        with beam.Pipeline(runner=RUNNERS[runner], options=pipeline_options) as pipeline:
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
    except Exception as e:  # runners may raise anything, mostly a worker's traceback as text
        lines = [line for line in str(e).splitlines() if line.strip()]
        raise UserError(f"--runner {runner}: {lines[-1] if lines else type(e).__name__}") from e


class _Tokenise(beam.DoFn):
    """Maps (number, parts) to a `Run`, and writes the run's object."""

    def __init__(self, source: Source, tokenizer, folder: Path, config: PrepareConfig):
        self._source, self._tokenizer, self._config = source, tokenizer, config
        self._folder = str(folder)

    def process(self, task):
        number, parts = task
        runs = storage.path(self._folder) / _RUNS
        shards, max_skipped = self._config.shards, self._config.max_skipped
        bad: list[tuple[str, str]] = []
        count = text_bytes = 0
        tables: list[list[np.ndarray]] = [[] for _ in range(shards)]
        error = ""

        def texts() -> Iterator[str]:
            for part in parts:
                for where, text in sources.read_part(self._source, part):
                    if isinstance(text, sources.Skipped):
                        bad.append((where, text.reason))
                        if len(bad) > max_skipped:
                            return
                    else:
                        yield text

        with tempfile.TemporaryDirectory(prefix="jllama-run-") as work:
            pieces = [open(Path(work, str(r)), "wb") for r in range(shards)]  # noqa: SIM115
            try:
                for chunk in grouped(texts(), len, CHUNK_CHARACTERS):
                    tokens, documents = worker.encode_texts(self._tokenizer, chunk)
                    tokens = tokens.astype(tokens.dtype.newbyteorder("<"))
                    for i, ids in enumerate(worker.by_document(tokens, documents)):
                        pieces[(count + i) % shards].write(ids.tobytes())
                    for i in range(shards):
                        tables[(count + i) % shards].append(documents[i::shards])
                    count += len(documents)
                    text_bytes += int(documents["bytes"].sum())
            except UserError as e:
                error = str(e)
            finally:
                for piece in pieces:
                    piece.close()
            file = Path(work, "run")
            empty = np.empty(0, worker.DOCUMENT)
            joined = [np.concatenate([empty, *table]) for table in tables]
            _write_run(file, [Path(piece.name) for piece in pieces], joined)
            storage.copy_file(file, runs / f"run-{number:05d}")
        result = Run(number, count, text_bytes, tuple(bad), error)
        storage.write_text(runs / f"run-{number:05d}.json", json.dumps(dataclasses.asdict(result)))
        yield result


class _Pack(beam.DoFn):
    """Packs the logical shard of a given number, and writes its counts beside the runs."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, config: PrepareConfig):
        self._vocab_size, self._config, self._folder = tokenizer.vocab_size, config, str(folder)

    def process(self, shard, runs: list[Run]):
        runs = sorted(runs, key=lambda run: run.number)
        bad = sum(len(run.bad) for run in runs)
        if bad > self._config.max_skipped or any(run.error for run in runs):
            return  # the process that started the pipeline raises the error
        folder, dtype = storage.path(self._folder), worker.token_dtype(self._vocab_size)
        with tempfile.TemporaryDirectory(prefix="jllama-shard-") as work:
            writer = ShardWriter(Path(work), shard, self._vocab_size, self._config)
            before = 0
            for run in runs:
                file = folder / _RUNS / f"run-{run.number:05d}"
                documents, tokens = _read_piece(
                    file, run.documents, self._config.shards, shard - before, dtype
                )
                parts = worker.by_document(tokens, documents)
                for ids, document in zip(parts, documents, strict=True):
                    writer.add(ids, document)
                before += run.documents
            counts = writer.close()
            for name in (records_file(shard, self._config.shards), documents_file(shard)):
                storage.copy_file(Path(work, name), folder / name)
        text = json.dumps(dataclasses.asdict(counts))
        storage.write_text(folder / _RUNS / f"shard-{shard:05d}.json", text)


def _write_run(run: Path, pieces: list[Path], tables: list[np.ndarray]) -> None:
    """Writes a run from its pieces.

    A run holds, little-endian: int64 [S+1], where each piece begins and ends among the tokens;
    the `DOCUMENT` of each document; and all tokens.
    """
    bounds = [0, *itertools.accumulate(int(table["tokens"].sum()) for table in tables)]
    with open(run, "wb") as file:
        file.write(np.array(bounds, "<i8").tobytes())
        for table in tables:
            file.write(table.tobytes())
        for piece in pieces:
            with open(piece, "rb") as opened:
                shutil.copyfileobj(opened, file)


def _read_piece(
    file: Path, documents: int, shards: int, shard: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (documents, tokens) of piece `shard` modulo S of a run, with S = `shards`."""
    r = shard % shards
    head, entry = 8 * (shards + 1), worker.DOCUMENT.itemsize
    start, stop = np.frombuffer(storage.read_range(file, 8 * r, 8 * r + 16), "<i8").tolist()
    first = sum(len(range(q, documents, shards)) for q in range(r))
    last = first + len(range(r, documents, shards))
    table = storage.read_range(file, head + entry * first, head + entry * last)
    base, size = head + entry * documents, dtype.itemsize
    tokens = storage.read_range(file, base + size * start, base + size * stop)
    return np.frombuffer(table, worker.DOCUMENT), np.frombuffer(tokens, dtype.newbyteorder("<"))


def _report(source: Source, runs: list[Run], max_skipped: int) -> int:
    """Reports skipped documents in order, as `jllama.data.source.documents` does; counts them."""
    skipped = 0
    for run in runs:
        for where, reason in run.bad:
            say(sources.skip_message(where, reason, skipped, max_skipped))
            skipped += 1
        if run.error:
            raise UserError(run.error)
    if not sum(run.documents for run in runs):
        raise sources.no_documents(source)
    return skipped
