"""Tokenises a source once and stores it on disk as a TFDS dataset of token blocks.

A document is stored as BOS, its tokens and EOS. Document `i` belongs to logical shard `i % shards`.
The documents of a shard are joined and cut into records of `block_tokens` tokens, which also hold
the places where documents start. So the bytes on disk depend on the source, the tokenizer, `shards`
and `block_tokens` alone, and not on the number of processes. `identity.json` is written last: it
marks the dataset as whole and says what it was made from. A folder without it is made again.
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
from typing import TypeVar

import numpy as np

from jllama.config import PrepareConfig, SourceConfig
from jllama.config.recipe import to_dict
from jllama.data import source as sources
from jllama.data import worker
from jllama.data.manifest import VERIFIED, check_unchanged, manifest
from jllama.data.prepared import FORMAT, MARKER, Prepared
from jllama.data.records import (
    ShardCounts,
    ShardWriter,
    documents_file,
    records_file,
    write_tfds_metadata,
)
from jllama.data.text_files import is_named_compressed
from jllama.errors import UserError
from jllama.files import storage
from jllama.files.locks import locked
from jllama.progress import Progress, say
from jllama.text.tokenizer import Tokenizer

CHUNK_CHARACTERS = 1 << 18  # of text, sent to a process at a time
_PROCESS_BYTES = 16_000_000  # of the source, enough to start one more process for
_LOCK = ".lock"
_NOT_DATA = {_LOCK, MARKER, VERIFIED}
_Item = TypeVar("_Item")


def prepare(
    source: SourceConfig,
    tokenizer: Tokenizer,
    config: PrepareConfig,
    make: Callable[..., None] | None = None,
) -> Prepared:
    """Returns the source as tokens, from `config.folder`; tokenises it unless it is there.

    `make` writes the dataset in another way than with processes of this machine; see
    `jllama.data.beam`.

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
    folder = _folder(storage.path(config.folder), source.name, identity[:16])
    prepared = Prepared.open(folder, config.cache)  # without the lock: the folder may be read-only
    if prepared is None:
        try:
            with locked(folder, _LOCK):
                prepared = Prepared.open(folder, config.cache)
                if prepared is None:
                    (make or _make)(folder, key, source, tokenizer, config)
        except OSError as e:
            where = e.filename or folder
            if e.errno == errno.EMFILE:
                fix = "raise ulimit -n, or lower data.prepare.shards"
                raise UserError(f"{where}: {e.strerror}; {fix}") from None
            with storage.writing(where):
                raise
        prepared = prepared or Prepared.open(folder, config.cache)
        assert prepared is not None
    prepared.name = source.name
    check_unchanged(prepared, source, config.max_skipped)
    return prepared


def _folder(parent: Path, name: str, key: str) -> Path:
    """The folder of the dataset `key`; that of a source with another name if it is whole there."""
    folder = parent / f"{name}-{key}"
    names = storage.listing(parent).folders
    if folder.name not in names:
        for other in sorted(names):
            if other.endswith(f"-{key}") and storage.exists(parent / other / MARKER):
                say(f"{parent / other}: used for the source {name}, whose files are the same")
                return parent / other
    return folder


def _make(
    folder: Path,
    key: dict,
    source: SourceConfig,
    tokenizer: Tokenizer,
    config: PrepareConfig,
) -> None:
    inputs = sources.source_files(source.source)
    compressed = any(is_named_compressed(f.path) or f.path.suffix == ".parquet" for f in inputs)
    size = None if compressed else sum(f.size for f in inputs)
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
    count = text_bytes = 0
    with _workplace(folder) as work, contextlib.ExitStack() as opened:
        shards = [ShardWriter(work, i, tokenizer.vocab_size, config) for i in range(config.shards)]
        for shard in shards:
            opened.callback(shard.abandon)
        with progress:
            for tokens, documents in _tokenise(texts, tokenizer, workers):
                parts = worker.by_document(tokens, documents)
                for ids, document in zip(parts, documents, strict=True):
                    shards[count % len(shards)].add(ids, document)
                    count += 1
                size = int(documents["bytes"].sum())
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
    """Completes the shards in `work` to the dataset in `folder`: metadata first, marker last.

    Raises UserError if the source's files have changed since they were listed in `inputs`, or if a
    shard's file is missing.
    """
    with tempfile.TemporaryDirectory(prefix="jllama-metadata-") as metadata:
        for name in write_tfds_metadata(Path(metadata), shards, tokenizer.vocab_size):
            storage.copy_file(Path(metadata, name), work / name)
    files = {
        n: size for n, size in sorted(storage.listing(work).files.items()) if n not in _NOT_DATA
    }
    numbers = range(len(shards))
    wanted = {records_file(i, len(shards)) for i in numbers} | {documents_file(i) for i in numbers}
    if missing := sorted(wanted - files.keys()):
        raise UserError(
            f"{work / missing[0]}: was removed while the dataset was made ({len(missing)} such"
            " files); let only one process at a time prepare it, then start again"
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
        "shard_document_digests": [s.document_digest for s in shards],
        "content": hashlib.sha256("".join(s.digest for s in shards).encode()).hexdigest(),
        "source_files": manifest(source, inputs),
        "files": files,
    }
    if work != folder:
        storage.transfer([(work / n, folder / n) for n in files])
    # The marker comes last: with it the dataset is whole.
    storage.write_text(folder / MARKER, json.dumps(identity, indent=1))


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """Yields the local folder to write shards to, since array_record writes only local files.

    If `folder` is local, it is the folder itself, which is emptied first, and again if the work
    fails. If it is a URL, it is a temporary folder, which needs room for the whole dataset.
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
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields `worker.encode_texts` of the texts, chunk by chunk in order, with few in flight."""
    chunks = grouped(texts, len, CHUNK_CHARACTERS)
    if workers == 1:
        for chunk in chunks:
            yield worker.encode_texts(tokenizer, chunk)
        return
    # Spawned and not forked, because JAX may have started threads by now.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), worker.start_worker, (tokenizer,)
    )
    pending: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(worker.encode_in_worker, chunk))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"prepare: one of {workers} tokenising processes died (out of memory?); "
            "lower data.prepare.workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def grouped(
    items: Iterable[_Item], size: Callable[[_Item], int], limit: int
) -> Iterator[list[_Item]]:
    """Yields lists of consecutive items; a list ends once the sizes in it sum to `limit`."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= limit:
            yield group
            group, total = [], 0
    if group:
        yield group


def wipe(folder: Path) -> None:
    """Removes what an earlier try left in a dataset's folder, except its lock."""
    if storage.is_remote(folder):
        storage.remove_folder(folder)
        return
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
