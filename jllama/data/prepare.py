"""Tokenises a source once and keeps it on disk as a TFDS dataset of token blocks.

A document is BOS, its tokens, EOS. Document `i` belongs to logical shard `i % shards`; the
documents of a shard, joined, are cut into records of `block_tokens` tokens with the places where
documents start. So the bytes on disk depend on the source, the tokenizer, `shards` and
`block_tokens` alone, never on how many processes made them. `identity.json`, written last, says
that the dataset is whole and what it was made from: a folder without it is made anew.
"""

import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from jllama.config import PrepareConfig, SourceConfig
from jllama.config.recipe import to_dict
from jllama.data import source as sources
from jllama.data import worker
from jllama.data.manifest import VERIFIED, check, manifest
from jllama.data.prepared import FORMAT, MARKER, Prepared
from jllama.data.records import (
    ShardCounts,
    ShardWriter,
    ends_file,
    records_file,
    write_tfds_metadata,
)
from jllama.errors import UserError
from jllama.files import storage
from jllama.files.locks import locked
from jllama.progress import Progress, say
from jllama.text.tokenizer import Tokenizer

_CHUNK_CHARACTERS = 1 << 18  # text that goes to a process at a time
_PROCESS_BYTES = 16_000_000  # source that is worth a process
_LOCK = ".lock"
_NOT_DATA = {_LOCK, MARKER, VERIFIED}


def prepare(
    source: SourceConfig,
    tokenizer: Tokenizer,
    config: PrepareConfig,
    make: Callable[..., None] | None = None,
) -> Prepared:
    """The source as tokens: found in `config.folder` if it is there, made if not.

    `make` makes it in another way than processes of this machine; see `jllama.data.beam`.

    Raises UserError if the source cannot be read, has more than `config.max_skipped` bad
    documents, or has changed since it was prepared.
    """
    key = {
        "format": FORMAT,
        "source": to_dict(source.source),
        "version": sources.version(source.source),
        "tokenizer": tokenizer.digest,
        "shards": config.shards,
        "block_tokens": config.block_tokens,
    }
    identity = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = storage.path(config.folder) / f"{source.name}-{identity[:16]}"
    prepared = Prepared.open(folder, config.cache)  # unlocked: it may be read-only by now
    if prepared is None:
        try:
            with locked(folder, _LOCK):
                prepared = Prepared.open(folder, config.cache)
                if prepared is None:
                    (make or _make)(folder, key, source, tokenizer, config)
        except OSError as e:
            fix = "data.prepare.folder must be writable"
            if e.errno == errno.EMFILE:
                fix = "raise ulimit -n or lower data.prepare.shards"
            raise UserError(f"{e.filename or folder}: {e.strerror}; {fix}") from None
        prepared = prepared or Prepared.open(folder, config.cache)
        assert prepared is not None
    check(prepared, source, config.max_skipped)
    return prepared


def _make(
    folder: Path,
    key: dict,
    source: SourceConfig,
    tokenizer: Tokenizer,
    config: PrepareConfig,
) -> None:
    inputs = sources.source_files(source.source)
    packed = any(f.path.suffix in (".gz", ".zst", ".parquet") for f in inputs)
    size = None if packed else sum(f.size for f in inputs)
    progress = Progress(f"prepare {source.name}", size)
    # A process takes longer to start than to tokenise a few megabytes.
    most = 1 + sum(f.size for f in inputs) // _PROCESS_BYTES
    workers = config.workers or min(os.cpu_count() or 1, most)
    skipped = 0

    def report(line: str) -> None:
        nonlocal skipped
        skipped += 1
        say(line)

    texts = (
        d.text
        for d in sources.documents(source.source, max_skipped=config.max_skipped, report=report)
    )
    documents = text_bytes = 0
    with _workplace(folder) as work, contextlib.ExitStack() as opened:
        shards = [ShardWriter(work, i, tokenizer.vocab_size, config) for i in range(config.shards)]
        for shard in shards:
            opened.callback(shard.abandon)
        with progress:
            for tokens, lengths, size in _tokenise(texts, tokenizer, workers):
                at = 0
                for n in lengths:
                    shards[documents % len(shards)].add(tokens[at : at + n])
                    documents, at = documents + 1, at + n
                text_bytes += size
                progress.advance(size)
        counts = [shard.close() for shard in shards]
        finish(folder, work, key, source, tokenizer, inputs, counts, text_bytes, skipped)


def finish(
    folder: Path,
    work: Path,
    key: dict,
    source: SourceConfig,
    tokenizer: Tokenizer,
    inputs: list[sources.SourceFile],
    shards: list[ShardCounts],
    text_bytes: int,
    skipped: int,
) -> None:
    """Makes the shards in `work` the dataset in `folder`: the metadata, and at last the marker.

    Raises UserError if the source's files are not `inputs` any more, or a shard's are not there.
    """
    with tempfile.TemporaryDirectory(prefix="jllama-metadata-") as metadata:
        for name in write_tfds_metadata(Path(metadata), shards, tokenizer.vocab_size):
            storage.copy_file(Path(metadata, name), work / name)
    there = {n: size for n, size in sorted(storage.names(work).items()) if n not in _NOT_DATA}
    numbers = range(len(shards))
    wanted = {records_file(i, len(shards)) for i in numbers} | {ends_file(i) for i in numbers}
    if missing := sorted(wanted - there.keys()):
        raise UserError(
            f"{work / missing[0]}: went away ({len(missing)} files did) while the dataset was made;"
            " let one process at a time prepare it, then start again"
        )
    identity = key | {
        "name": source.name,
        "vocab_size": tokenizer.vocab_size,
        "documents": sum(s.documents for s in shards),
        "tokens": sum(s.tokens for s in shards),
        "bytes": text_bytes,
        "skipped": skipped,
        "shard_tokens": [s.tokens for s in shards],
        "shard_documents": [s.documents for s in shards],
        "content": hashlib.sha256("".join(s.digest for s in shards).encode()).hexdigest(),
        "source_files": manifest(source, inputs),
        "files": there,
    }
    if work != folder:
        storage.transfer(storage.upload, [(work / n, folder / n) for n in there])
    # Last, and so the dataset is whole.
    storage.write_text(folder / MARKER, json.dumps(identity, indent=1))


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """Where shards are written: array_record writes local files alone.

    For a local folder itself, empty at the start and again if the work fails; for a URL a temporary
    folder of this machine, with room for the whole dataset.
    """
    if storage.is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="jllama-prepare-") as work:
            yield Path(work)
        return
    wipe(folder)
    try:
        yield folder
    except BaseException:
        wipe(folder)
        raise


def _tokenise(
    texts: Iterable[str], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[np.ndarray, list[int], int]]:
    """`worker.encode` of the texts, chunk by chunk in order, with few chunks in flight."""
    if workers == 1:
        for chunk in chunks(texts):
            yield worker.encode(tokenizer, chunk)
        return
    # Spawned, not forked: JAX may have threads by now.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), worker.start, (tokenizer,)
    )
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for chunk in chunks(texts):
            pending.append(pool.submit(worker.encode_here, chunk))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"prepare: one of {workers} tokenising processes died (out of memory?); "
            "lower prepare.workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about `_CHUNK_CHARACTERS`."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def wipe(folder: Path) -> None:
    """Empties a dataset's folder of what an earlier try left in it, but for its lock."""
    if storage.is_remote(folder):
        storage.remove_folder(folder)
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
