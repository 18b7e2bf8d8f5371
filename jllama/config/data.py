"""Config of the data: sources of text, packing of documents into rows, objective of training."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

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
    """The Python standard library of the running interpreter, without its tests.

    Each file is a document.
    """

    kind: Literal["stdlib"] = doc("the standard library of the running Python interpreter")
    split: Literal["train", "held_out"] = doc("part of the files, by a hash of their relative path")
    held_out_one_in: Annotated[int, Field(ge=2)] = default("one file in this many is held out", 25)
    max_characters: Count = default(
        "files are cut between lines into documents of at most this many characters; 0 means whole"
        " files",
        0,
    )


@configclass
class TfdsSource:
    """A TensorFlow Datasets dataset stored as array_record; TensorFlow is not needed."""

    kind: Literal["tfds"] = doc("a TensorFlow Datasets dataset in array_record format")
    name: str = doc("name/config:version, or the folder of a dataset that is built")
    split: str = doc("split or slice, such as train or train[:95%]")
    field: str = default("feature that holds the text", "text")
    data_dir: str | None = default("folder of the datasets; null means TFDS's default", None)


@configclass
class TextSource:
    """Plain UTF-8 text files, which may be compressed (gzip, zstd, bzip2, xz)."""

    kind: Literal["text"] = doc("plain UTF-8 files, which may be compressed")
    files: tuple[str, ...] = doc("paths or globs, read in sorted order")
    separator: str | None = default(
        "text between two documents; null makes each file one document", None
    )


@configclass
class JsonlSource:
    """Files with a JSON object per line, or with a JSON array of objects.

    They may be compressed (gzip, zstd, bzip2, xz).
    """

    kind: Literal["jsonl"] = doc("one JSON object per line, or one array of them")
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
    weight: PositiveFloat = default("share of the rows, over the sum of all weights", 1.0)
    source: Source = doc("where the documents come from")


@configclass
class HeldOutShare:
    """Holds out a share of each training source's documents, by a hash of their text.

    The text alone decides, so that equal documents are never on both sides, whatever their order,
    their source or the tokenizer. Neither the model nor a trained tokenizer sees what is held out.
    """

    source: Literal["train"] = doc("the sources whose documents are held out", alias="from")
    one_in: Annotated[int, Field(ge=2)] = doc("one document in this many is held out")


def _held_out_form(value: Any) -> str | None:
    match value:
        case list() | tuple():
            return "sources"
        case dict() | HeldOutShare():
            return "share"
    return None


HeldOut = Annotated[
    Annotated[tuple[SourceConfig, ...], Tag("sources")] | Annotated[HeldOutShare, Tag("share")],
    Discriminator(
        _held_out_form,
        custom_error_type="held_out",
        custom_error_message="Expected a list of sources or {from: train, one_in: 25}",
    ),
]


@configclass
class CutPacking:
    """Cuts rows from the stream of all documents: a document continues in the next row."""

    kind: Literal["cut"] = doc("documents continue in the next row; no padding")


@configclass
class WholePacking:
    """Puts whole documents into rows, several to a row by best fit; padding fills the rest."""

    kind: Literal["whole"] = doc("whole documents, several to a row by best fit")
    too_long: Literal["error", "skip", "cut"] = default(
        "what to do with documents longer than a row; cut drops their end", "error"
    )


Packing = Annotated[CutPacking | WholePacking, Field(discriminator="kind")]


@configclass
class CausalObjective:
    """Predicts documents as they are."""

    kind: Literal["causal"] = doc("predicts each document from its beginning to its end")


@configclass
class InfillObjective:
    """Code Llama's infilling (arXiv:2308.12950): the middle of a document comes last.

    A document that a row holds whole is cut in three at two random characters, at others in each
    epoch; other documents stay as they are. The tokenizer needs the infill tokens.
    """

    kind: Literal["infill"] = doc("predicts the middle of a document after its beginning and end")
    rate: Fraction = default("share of the documents that are cut", 0.9)
    spm: Fraction = default("share of the cut documents in the order SPM instead of PSM", 0.5)


@configclass
class ReplyObjective:
    """Instruction tuning: predicts the reply in a document, and not the prompt before it.

    Prompt and reply are encoded separately, as when a model replies. A document whose end was cut
    off before the marker has no weight.
    """

    kind: Literal["reply"] = doc("predicts only the replies to prompts")
    after: str = default(
        "the prompt ends with the first occurrence of this text", "### Response:", min_length=1
    )
    second_marker: Literal["error", "predict"] = default(
        "what to do if `after` occurs again in a document; predict takes all after the first as the"
        " reply, later prompts too",
        "error",
    )
    no_marker: Literal["error", "predict"] = default(
        "what to do with a document without `after`; predict takes all of it, its prompt too",
        "error",
    )


Objective = Annotated[
    CausalObjective | InfillObjective | ReplyObjective, Field(discriminator="kind")
]


@configclass
class PrepareConfig:
    """How text is tokenised on disk, once per source and tokenizer."""

    folder: str = default("folder of the prepared datasets", "prepared")
    shards: PositiveInt = default("array_record files per dataset", 4)
    block_tokens: PositiveInt = default("tokens per record", 4096)
    workers: Count = default("processes that tokenise; 0 means one per core", 0)
    cache: str = default(
        "local folder for copies of the shards if folder is a URL; if empty, gs:// is read in"
        " place and s3:// cannot be read",
        "",
    )
    max_skipped: Count = default("unusable documents that may be skipped; one more is an error", 0)


@configclass
class DataConfig:
    """Where rows come from and how they are made."""

    length: PositiveInt = doc("predicted tokens per row")
    packing: Packing = doc("how documents fill rows")
    objective: Objective = default(
        "what training rows predict; held-out rows are causal, but for replies",
        CausalObjective(kind="causal"),
    )
    document_mask: bool = default(
        "attention and positions stay within a document; if false, within the row (LLaMA 1 and 2)",
        True,
    )
    train: tuple[SourceConfig, ...] = doc("training sources", min_length=1)
    held_out: HeldOut = default("evaluation sources, or a share of the training sources", ())
    prepare: PrepareConfig = default("tokenised text on disk", PrepareConfig())
    prefetch: Count = default("batches that threads read ahead", 4)

    def __post_init__(self):
        if isinstance(self.objective, ReplyObjective) and isinstance(self.packing, CutPacking):
            raise ValueError(
                "objective.kind=reply: needs packing.kind=whole, because a part of a document"
                " does not show where its reply begins"
            )
