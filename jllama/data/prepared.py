"""Opens a prepared dataset: its counts, and random access to its stream of tokens.

If its folder is a gs:// URL, array_record reads it in place, with one request per record. With a
cache, which s3:// needs, every machine fetches the shards once and reads its copies.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from jllama.data.records import decode_record, documents_file, records_file
from jllama.data.worker import DOCUMENT
from jllama.errors import UserError
from jllama.files import storage
from jllama.files.locks import locked

FORMAT = 2
MARKER = "identity.json"


class Prepared:
    """The tokens of one source: a stream of ids, shard after shard. Several threads may read it.

    Attributes:
      documents, tokens: how many the stream has; the tokens include BOS and EOS.
      bytes: UTF-8 bytes of the documents.
      digest: SHA-256 of the content, in hex.
    """

    def __init__(self, folder: Path, identity: dict, copies: Path | None = None):
        """`copies` is a local folder with copies of the files, which are read instead."""
        self.folder = folder
        self.identity = identity
        self.name: str = identity["name"]
        self.documents: int = identity["documents"]
        self.tokens: int = identity["tokens"]
        self.bytes: int = identity["bytes"]
        self.vocab_size: int = identity["vocab_size"]
        self.digest: str = identity["content"]
        self._shards = len(identity["shard_tokens"])
        self._block = identity["block_tokens"]
        tokens = np.array(identity["shard_tokens"], np.int64)
        records = -(-tokens // self._block)
        # The first token and the first record of each shard.
        self._token_starts = np.concatenate([[0], np.cumsum(tokens)])
        self._record_starts = np.concatenate([[0], np.cumsum(records)])
        self._files = folder if copies is None else copies
        # With the number of records in its name, array_record opens a file only to read it.
        self._records = ArrayRecordDataSource(
            [
                f"{self._files / records_file(i, self._shards)}[0:{n}]"
                for i, n in enumerate(records)
                if n
            ]
        )

    @classmethod
    def open(cls, folder: str | Path, cache: str = "") -> "Prepared | None":
        """Returns the dataset in `folder`, or None if it was never finished.

        `cache` is a local folder for copies of a dataset at a URL; s3:// needs one. Raises
        UserError if the dataset is damaged.
        """
        folder = storage.path(folder)
        if str(folder).startswith("s3://") and not cache:
            raise UserError(
                f"{folder}: array_record reads only local files and gs://; name a local"
                " folder for copies in data.prepare.cache"
            )
        try:
            identity = json.loads(storage.read_text(folder / MARKER))
        except (storage.NoSuchFile, ValueError):
            return None
        sizes = storage.listing(folder).files
        for name, size in identity["files"].items():
            if sizes.get(name) != size:
                raise UserError(
                    f"{folder / name}: missing or cut short; delete {folder} to prepare the"
                    " source again"
                )
        return cls(folder, identity, _copies(folder, identity, cache))

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the stream positions [start, stop).

        The result is (tokens int32, whether a document starts there bool), both [stop - start].
        """
        tokens = np.empty(stop - start, np.int32)
        starts = np.zeros(stop - start, bool)
        at = start
        while at < stop:
            shard = int(np.searchsorted(self._token_starts, at, side="right")) - 1
            block, skip = divmod(at - int(self._token_starts[shard]), self._block)
            number = int(self._record_starts[shard]) + block
            try:
                block_tokens, block_starts = decode_record(self._records[number], self.vocab_size)
            except Exception as e:  # array_record and protobuf raise exceptions of many types
                raise self._broken(records_file(shard, self._shards), e) from None
            n = min(stop - at, len(block_tokens) - skip)
            tokens[at - start : at - start + n] = block_tokens[skip : skip + n]
            offsets = block_starts - skip
            starts[at - start + offsets[(offsets >= 0) & (offsets < n)]] = True
            at += n
        return tokens, starts

    def document_table(self) -> np.ndarray:
        """Returns the `DOCUMENT` of each document, in the order of the stream: [documents]."""
        tables = []
        for shard, digest in enumerate(self.identity["shard_document_digests"]):
            data = storage.read_bytes(self._files / documents_file(shard))
            if hashlib.sha256(data).hexdigest() != digest:
                raise self._broken(documents_file(shard), "its bytes are not those written")
            tables.append(np.frombuffer(data, DOCUMENT))
        return np.concatenate(tables)

    def document_ends(self) -> np.ndarray:
        """Returns the stream position after each document: int64 [documents]."""
        return np.cumsum(self.document_table()["tokens"].astype(np.int64))

    def number(self, document: int) -> int:
        """Returns the number in the source, from 1, of a document of the stream, from 0."""
        firsts = np.concatenate([[0], np.cumsum(self.identity["shard_documents"])])
        shard = int(np.searchsorted(firsts, document, side="right")) - 1
        return (document - int(firsts[shard])) * self._shards + shard + 1

    def _broken(self, name: str, why: object) -> UserError:
        again = f"delete {self._files} to " + (
            "prepare the source again" if self._files == self.folder else "fetch it again"
        )
        return UserError(f"{self._files / name}: broken: {storage.one_line(why)}; {again}")


def _copies(folder: Path, identity: dict, cache: str) -> Path | None:
    """Returns the local folder with copies of a dataset at a URL; fetches those that are missing.

    Returns None for a local dataset, and without a cache.
    """
    if not (storage.is_remote(folder) and cache):
        return None
    # The key covers URL and content, because other bytes may have the same folder name.
    key = hashlib.sha256(f"{folder} {identity['content']}".encode()).hexdigest()
    copies = storage.path(cache) / f"{folder.name}-{key[:16]}"
    with locked(copies):
        sizes = storage.listing(copies).files
        missing = [n for n, size in identity["files"].items() if sizes.get(n) != size]
        storage.transfer([(folder / n, copies / n) for n in missing])
    return copies
