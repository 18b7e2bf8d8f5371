"""The files of a prepared dataset: array_record shards of token blocks that TFDS reads.

A record is a tf.train.Example with `tokens` (uint16 or uint32, little-endian bytes) and `starts`
(int32: the places in the record where documents start). Beside each shard a plain file says where
its documents end.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from jllama.config import PrepareConfig
from jllama.data.worker import token_dtype
from jllama.files.protobuf import bytes_field, fields


def records_file(shard: int, shards: int) -> str:
    """Name that TFDS expects for a shard's token blocks."""
    return f"tokens-train.array_record-{shard:05d}-of-{shards:05d}"


def ends_file(shard: int) -> str:
    """Name of the little-endian uint64 file of where, in the shard, each document ends."""
    return f"document-ends.{shard:05d}.u64"


@functools.cache
def features(vocab_size: int) -> tfds.features.FeaturesDict:
    """One record: tokens, and the places in it where documents start."""
    kinds = {"tokens": token_dtype(vocab_size).type, "starts": np.int32}
    return tfds.features.FeaturesDict(
        {
            name: tfds.features.Tensor(
                shape=(None,), dtype=dtype, encoding=tfds.features.Encoding.BYTES
            )
            for name, dtype in kinds.items()
        }
    )


def encode_record(tokens: np.ndarray, starts: np.ndarray) -> bytes:
    """A record of `features` as TFDS stores it: a tf.train.Example in protobuf's wire format.

    TFDS's own writer orders the two features at random, and equal data must give equal bytes.
    """
    entries = b""
    for name, values in (("starts", starts), ("tokens", tokens)):
        data = values.astype(values.dtype.newbyteorder("<")).tobytes()
        bytes_list = bytes_field(1, data)
        feature = bytes_field(1, bytes_list)
        entries += bytes_field(1, bytes_field(1, name.encode()) + bytes_field(2, feature))
    return bytes_field(1, entries)


def decode_record(data: bytes, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, starts) of a record. Three times faster than TFDS's reader, which gives the same."""
    values = {}
    for entry in _payloads(_payloads(memoryview(data))[0]):
        name, feature = _payloads(entry)
        values[bytes(name)] = _payloads(_payloads(feature)[0])[0]
    tokens = np.frombuffer(values[b"tokens"], token_dtype(vocab_size).newbyteorder("<"))
    return tokens, np.frombuffer(values[b"starts"], "<i4")


def _payloads(message: memoryview) -> list[memoryview]:
    """The values of a message's fields, all of which are length-delimited."""
    return [value for _, value in fields(message)]


@dataclasses.dataclass(frozen=True)
class ShardCounts:
    """What a shard came to: tokens, documents, records and their bytes, SHA-256 of the records."""

    tokens: int
    documents: int
    records: int
    record_bytes: int
    digest: str


class ShardWriter:
    """One array_record file being written, and beside it where its documents end."""

    def __init__(self, folder: Path, shard: int, vocab_size: int, config: PrepareConfig):
        self._tokens = self._documents = self._written = self._bytes = 0
        self._block = np.empty(config.block_tokens, token_dtype(vocab_size))
        self._filled, self._starts = 0, []
        self._hash = hashlib.sha256()
        # One record a group, uncompressed: a row reads no more than the records it covers.
        path = folder / records_file(shard, config.shards)
        self._records = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        self._ends = (folder / ends_file(shard)).open("wb")

    def add(self, tokens: np.ndarray) -> None:
        self._starts.append(self._filled)
        self._tokens += len(tokens)
        self._documents += 1
        self._ends.write(np.uint64(self._tokens).astype("<u8").tobytes())
        while len(tokens):
            part = tokens[: len(self._block) - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            tokens = tokens[len(part) :]
            if self._filled == len(self._block):
                self._flush()

    def _flush(self) -> None:
        data = encode_record(self._block[: self._filled], np.array(self._starts, np.int32))
        self._records.write(data)
        self._hash.update(data)
        self._written += 1
        self._bytes += len(data)
        self._filled, self._starts = 0, []

    def close(self) -> ShardCounts:
        if self._filled:
            self._flush()
        self._records.close()
        self._ends.close()
        return ShardCounts(
            self._tokens, self._documents, self._written, self._bytes, self._hash.hexdigest()
        )

    def abandon(self) -> None:
        if self._records.is_open():
            self._records.close()
        self._ends.close()


def write_tfds_metadata(folder: Path, shards: list[ShardCounts], vocab_size: int) -> list[str]:
    """What `tfds.builder_from_directory` needs to read the shards as the split `train`.

    Written to an empty local folder, in which TFDS wants to see the shards' names; returns the
    names of the files to put beside the shards.
    """
    stand_ins = {records_file(i, len(shards)) for i in range(len(shards))}
    for name in stand_ins:
        (folder / name).touch()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="tokens", split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train",
        shard_lengths=[s.records for s in shards],
        num_bytes=sum(s.record_bytes for s in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features(vocab_size), split_infos=[split], check_data=False
    )
    return sorted({p.name for p in folder.iterdir()} - stand_ins)
