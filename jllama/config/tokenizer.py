"""Config of the tokenizer."""

from typing import Annotated, Literal

from pydantic import Field

from jllama.config.base import PositiveInt, configclass, default, doc

LEAST_PIECES = 300  # of a trained vocabulary; 259 of them are control and byte pieces


@configclass
class TokenizerFile:
    """An existing tokenizer."""

    kind: Literal["file"] = doc("an existing tokenizer")
    path: str = doc("tokenizer.model, tokenizer.json, or a folder with one of them")


@configclass
class TrainedTokenizer:
    """A lossless SentencePiece BPE model with byte fallback, trained on the training sources."""

    kind: Literal["train"] = doc("train SentencePiece BPE on the training sources")
    vocab_size: Annotated[int, Field(ge=LEAST_PIECES)] = doc(
        "number of pieces, including 3 control and 256 byte pieces"
    )
    max_bytes: PositiveInt = default("bytes of text to train on", 50_000_000)
    cross_words: bool = default("pieces may span several words", False)
    infill: bool = default(
        "include the 4 control pieces that data.objective.kind=infill needs", False
    )


TokenizerConfig = Annotated[TokenizerFile | TrainedTokenizer, Field(discriminator="kind")]
