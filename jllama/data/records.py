"""The files of a prepared dataset: array_record shards of token blocks that TFDS reads.

A record is a tf.train.Example with `tokens` (uint16 or uint32) and `starts` (int32, the places in
the record where documents start), both as little-endian bytes. Beside each shard lies a plain file
with a `DOCUMENT` of each of its documents.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from jllama.config import PrepareConfig
from jllama.data.worker import token_dtype


def records_file(shard: int, shards: int) -> str:
    """Returns the name that TFDS expects for a shard's records."""
    return f"tokens-train.array_record-{shard:05d}-of-{shards:05d}"


def documents_file(shard: int) -> str:
    """Returns the name of the file with the `DOCUMENT` of each document in a shard."""
    return f"documents.{shard:05d}.u64"


@functools.cache
def features(vocab_size: int) -> tfds.features.FeaturesDict:
    """Returns the features of a record, for TFDS."""
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
    """Returns a record of `features` as TFDS stores it, a serialised tf.train.Example.

    Equal data give equal bytes: TFDS's own writer orders the two features at random.
    """
    example = tf_example_pb2.Example()
    for name, values in (("starts", starts), ("tokens", tokens)):
        data = values.astype(values.dtype.newbyteorder("<")).tobytes()
        example.features.feature[name].bytes_list.value.append(data)
    return example.SerializeToString(deterministic=True)


def decode_record(data: bytes, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, starts) of a record; several times faster than TFDS's own reader."""
    feature = tf_example_pb2.Example.FromString(data).features.feature
    tokens, starts = (feature[name].bytes_list.value[0] for name in ("tokens", "starts"))
    dtype = token_dtype(vocab_size).newbyteorder("<")
    return np.frombuffer(tokens, dtype), np.frombuffer(starts, "<i4")


@dataclasses.dataclass(frozen=True)
class ShardCounts:
    """The size of a shard, and the SHA-256 of its records and of its documents' file, in hex."""

    tokens: int
    documents: int
    records: int
    record_bytes: int
    digest: str
    document_digest: str


class ShardWriter:
    """Writes one shard: its array_record file and the file with what is known of its documents."""

    def __init__(self, folder: Path, shard: int, vocab_size: int, config: PrepareConfig):
        self._tokens = self._count = self._written = self._bytes = 0
        self._block = np.empty(config.block_tokens, token_dtype(vocab_size))
        self._filled, self._starts = 0, []
        self._hash, self._document_hash = hashlib.sha256(), hashlib.sha256()
        # One record a group, uncompressed: a row reads no more than the records it covers.
        path = folder / records_file(shard, config.shards)
        self._records = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        self._documents = (folder / documents_file(shard)).open("wb")

    def add(self, tokens: np.ndarray, document: np.void) -> None:
        """Appends a document and its `DOCUMENT`."""
        self._starts.append(self._filled)
        self._tokens += len(tokens)
        self._count += 1
        self._documents.write(document.tobytes())
        self._document_hash.update(document.tobytes())
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
        """Writes what remains and closes the files."""
        if self._filled:
            self._flush()
        self._records.close()
        self._documents.close()
        return ShardCounts(
            tokens=self._tokens,
            documents=self._count,
            records=self._written,
            record_bytes=self._bytes,
            digest=self._hash.hexdigest(),
            document_digest=self._document_hash.hexdigest(),
        )

    def abandon(self) -> None:
        """Closes the files without writing what remains. Does nothing after `close`."""
        if self._records.is_open():
            self._records.close()
        self._documents.close()


def write_tfds_metadata(folder: Path, shards: list[ShardCounts], vocab_size: int) -> list[str]:
    """Writes what `tfds.builder_from_directory` needs to read the shards as the split `train`.

    `folder` is an empty local folder. Returns the names of the files in it that belong beside the
    shards.
    """
    # TFDS looks for the shards' names beside the metadata.
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
