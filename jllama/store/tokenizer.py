"""The tokenizer of a model or an adapter on storage: its folder's, another's, or none."""

from pathlib import Path

from jllama.errors import StorageError, UserError
from jllama.progress import note
from jllama.store.find import Found
from jllama.text.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

NONE = "none"


def tokenizer_of(found: Found, given: str | Path | None = None) -> Tokenizer | None:
    """The tokenizer, or None where the folder has none, or one that cannot be read; that is said.

    Args:
      given: the path of another to take, or "none".

    Raises UserError if another is given that cannot be read.
    """
    if given is not None:
        return None if str(given) == NONE else load_tokenizer(given)
    try:
        return find_tokenizer(found.folder, found.files)
    except StorageError:
        raise
    except UserError as e:
        note(
            f"the model is read without its tokenizer: {e}; give another where one is needed"
            " (--tokenizer PATH)"
        )
        return None
