"""tokenizer.json, read by Hugging Face's `tokenizers`."""

from collections.abc import Iterable

from jllama.text.interface import Tokenizer


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of byte-level or SentencePiece-like byte pair encoding.

    Attributes:
      json: the file, parsed.
    """

    json: dict

    def __init__(
        self,
        json: dict,
        where: str = "tokenizer",
        *,
        bos: str = "",
        eos: str = "",
        stop_ids: Iterable[int] = (),
    ):
        raise NotImplementedError
