"""Where the tokenizer comes from."""

from typing import Annotated, Literal

from pydantic import Field

from jllama.config.base import PositiveInt, configclass, default, doc


@configclass
class TokenizerFile:
    """A tokenizer that exists."""

    kind: Literal["file"] = doc("a tokenizer that exists")
    path: str = doc("tokenizer.model, tokenizer.json, or a folder that holds one")


@configclass
class TrainedTokenizer:
    """A SentencePiece BPE model trained on the training sources: lossless, with byte fallback."""

    kind: Literal["train"] = doc("train SentencePiece BPE on the training sources")
    vocab_size: Annotated[int, Field(ge=300)] = doc("pieces, the 3 control and 256 byte ones in it")
    max_bytes: PositiveInt = default("text read for training, in bytes", 50_000_000)
    cross_words: bool = default("pieces may span several words", False)
    infill: bool = default("4 more control pieces, as data.objective.kind=infill needs", False)


TokenizerConfig = Annotated[TokenizerFile | TrainedTokenizer, Field(discriminator="kind")]
