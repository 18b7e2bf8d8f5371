"""Sources of text, how documents fill rows, and what rows teach."""

from typing import Annotated, Literal

from pydantic import Field

from jllama.config.base import (
    Count,
    Fraction,
    PositiveFloat,
    PositiveInt,
    configclass,
    default,
    doc,
)


@configclass
class StdlibSource:
    """The running interpreter's Python standard library, without tests: one document a file."""

    kind: Literal["stdlib"] = doc("the running interpreter's own standard library")
    split: Literal["train", "held_out"] = doc("which part, by a hash of the relative path")
    held_out_one_in: Annotated[int, Field(ge=2)] = default("one file in so many is held out", 25)
    max_characters: Count = default(
        "cut files between lines into documents of at most so many characters; 0 is whole files", 0
    )


@configclass
class TfdsSource:
    """A TensorFlow Datasets dataset stored as array_record; TensorFlow is not needed."""

    kind: Literal["tfds"] = doc("a TensorFlow Datasets dataset in array_record format")
    name: str = doc("name/config:version, or the folder of a prepared dataset")
    split: str = doc("split or slice, such as train or train[:95%]")
    field: str = default("feature that holds the text", "text")
    data_dir: str | None = default("where datasets are stored; null is TFDS's default", None)


@configclass
class TextSource:
    """Plain UTF-8 text files, .gz and .zst too."""

    kind: Literal["text"] = doc("plain UTF-8 files, .gz and .zst too")
    files: tuple[str, ...] = doc("paths or globs, read in sorted order")
    separator: str | None = default(
        "text between two documents; null makes a file one document", None
    )


@configclass
class JsonlSource:
    """One JSON object a line, .gz and .zst too."""

    kind: Literal["jsonl"] = doc("one JSON object a line, .gz and .zst too")
    files: tuple[str, ...] = doc("paths or globs, read in sorted order")
    field: str = default("key that holds the text", "text")


@configclass
class ParquetSource:
    """Parquet files with a string column."""

    kind: Literal["parquet"] = doc("Parquet files")
    files: tuple[str, ...] = doc("paths or globs, read in sorted order")
    field: str = default("column that holds the text", "text")


Source = Annotated[
    StdlibSource | TfdsSource | TextSource | JsonlSource | ParquetSource,
    Field(discriminator="kind"),
]


@configclass
class SourceConfig:
    """A named source and its share of the mixture."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = doc("short name, for reports")
    weight: PositiveFloat = default("share of the rows; shares are normalised", 1.0)
    source: Source = doc("where the documents come from")


@configclass
class CutPacking:
    """Rows cut from the stream of documents: a document continues in the next row."""

    kind: Literal["cut"] = doc("documents continue in the next row; no padding")


@configclass
class WholePacking:
    """Whole documents, several to a row by best fit; the rest of a row is padding."""

    kind: Literal["whole"] = doc("documents are never cut; best fit by length")
    too_long: Literal["error", "skip"] = default("documents longer than a row", "error")


Packing = Annotated[CutPacking | WholePacking, Field(discriminator="kind")]


@configclass
class CausalObjective:
    """Documents as they are."""

    kind: Literal["causal"] = doc("each document from its beginning to its end")


@configclass
class InfillObjective:
    """Code Llama's infilling (arXiv:2308.12950): middles come last, cut anew each epoch.

    Documents that a row holds whole are cut in three at two random characters; others stay as
    they are. The tokenizer needs the infill tokens.
    """

    kind: Literal["infill"] = doc("the middle of a document after what surrounds it")
    rate: Fraction = default("share of the documents that are cut", 0.9)
    spm: Fraction = default("share of these that are suffix-prefix-middle, not PSM", 0.5)


@configclass
class ReplyObjective:
    """Instruction tuning: of a document the reply is predicted, and the prompt before it is not.

    Prompt and reply are encoded apart, as when a model replies. A document that a row does not hold
    whole, or without the marker, is predicted as it is.
    """

    kind: Literal["reply"] = doc("prompts and replies, of which replies are predicted")
    after: str = default(
        "the prompt ends with this, where it first appears", "### Response:", min_length=1
    )


Objective = Annotated[
    CausalObjective | InfillObjective | ReplyObjective, Field(discriminator="kind")
]


@configclass
class PrepareConfig:
    """How text becomes tokens on disk, once per source and tokenizer."""

    folder: str = default("where prepared datasets are kept", "prepared")
    shards: PositiveInt = default("array_record files per dataset", 4)
    block_tokens: PositiveInt = default("tokens per record", 4096)
    workers: Count = default("processes that tokenise; 0 is one per core", 0)
    cache: str = default(
        "local folder for copies of shards whose folder is a URL; empty reads gs:// in place and"
        " s3:// not at all",
        "",
    )
    max_skipped: Count = default("bad documents that may be skipped; one more is an error", 0)


@configclass
class DataConfig:
    """Where rows come from and how they are cut."""

    length: PositiveInt = doc("predicted tokens per row")
    packing: Packing = doc("how documents fill rows")
    objective: Objective = default(
        "what training rows teach; held-out rows are causal", CausalObjective(kind="causal")
    )
    document_mask: bool = default(
        "attention and positions stay within a document; false: within the row, as LLaMA 1 and 2",
        True,
    )
    train: tuple[SourceConfig, ...] = doc("training sources", min_length=1)
    held_out: tuple[SourceConfig, ...] = default("sources for evaluation", ())
    prepare: PrepareConfig = default("tokenisation on disk", PrepareConfig())
    prefetch: Count = default("batches read ahead by threads", 4)
