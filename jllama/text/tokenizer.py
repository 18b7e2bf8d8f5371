"""The door to tokenizers: a file or a folder in, a `Tokenizer` out."""

from pathlib import Path

from jllama import storage
from jllama.errors import UserError
from jllama.text.huggingface import HuggingFaceTokenizer
from jllama.text.interface import TextStream, Tokenizer
from jllama.text.llama3 import TiktokenTokenizer
from jllama.text.spm import SentencePieceTokenizer

__all__ = [
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "TextStream",
    "TiktokenTokenizer",
    "Tokenizer",
    "load_tokenizer",
]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from its file, or from a folder that holds one; URLs too."""
    path = storage.path(path)
    if storage.is_folder(path):
        path = path / "tokenizer.model"
    try:
        return SentencePieceTokenizer(storage.read_bytes(path), where=str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer file") from None
