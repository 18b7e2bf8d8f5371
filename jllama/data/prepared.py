"""A prepared dataset on disk, opened: its counts, and random access to its stream of tokens."""

import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from jllama.data.records import decode_record, ends_file, records_file
from jllama.errors import UserError

FORMAT = 1
MARKER = "identity.json"


class Prepared:
    """The tokens of one source: a stream of `tokens` ids, the shards one after another.

    Safe to read from several threads.
    """

    def __init__(self, folder: Path, identity: dict):
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
        # Where each shard begins: in the stream, and among the records.
        self._token_starts = np.concatenate([[0], np.cumsum(tokens)])
        self._record_starts = np.concatenate([[0], np.cumsum(-(-tokens // self._block))])
        names = [records_file(i, self._shards) for i in range(self._shards)]
        self._records = ArrayRecordDataSource(
            [str(folder / n) for n, size in zip(names, tokens, strict=True) if size]
        )

    @classmethod
    def open(cls, folder: str | Path) -> "Prepared | None":
        """The dataset in `folder`; None if it was never finished. UserError if it is damaged."""
        folder = Path(folder)
        try:
            identity = json.loads((folder / MARKER).read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        for name, size in identity["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path}: missing or cut short; delete {folder} to prepare anew")
        return cls(folder, identity)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Stream positions [start, stop): (tokens int32, whether a document starts there, bool)."""
        tokens = np.empty(stop - start, np.int32)
        starts = np.zeros(stop - start, bool)
        at = start
        while at < stop:
            shard = int(np.searchsorted(self._token_starts, at, side="right")) - 1
            block, skip = divmod(at - int(self._token_starts[shard]), self._block)
            record = self._records[int(self._record_starts[shard]) + block]
            block_tokens, block_starts = decode_record(record, self.vocab_size)
            n = min(stop - at, len(block_tokens) - skip)
            tokens[at - start : at - start + n] = block_tokens[skip : skip + n]
            here = block_starts - skip
            starts[at - start + here[(here >= 0) & (here < n)]] = True
            at += n
        return tokens, starts

    def document_ends(self) -> np.ndarray:
        """Stream position after each document, shard by shard: int64 [documents]."""
        ends = []
        for shard in range(self._shards):
            if self.identity["shard_documents"][shard]:
                path = self.folder / ends_file(shard)
                ends.append(np.fromfile(path, "<u8").astype(np.int64) + self._token_starts[shard])
        return np.concatenate(ends)
