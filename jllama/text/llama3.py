"""Llama-3's tokenizer: byte pair encoding from a tiktoken-format tokenizer.model."""

from collections.abc import Iterable

from jllama.text.interface import Tokenizer


class TiktokenTokenizer(Tokenizer):
    """Byte pair encoding by ranks, and Llama-3's 256 special tokens after them.

    Attributes:
      ranks: the bytes of each piece -> its id.
    """

    ranks: dict[bytes, int]

    def __init__(self, model: bytes, where: str = "tokenizer", *, stop_ids: Iterable[int] = ()):
        raise NotImplementedError
