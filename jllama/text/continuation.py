"""The ids of a text to continue, and of a text that continues it."""

from jllama.text.infill import encode_continued
from jllama.text.interface import Tokenizer


def text_ids(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """Returns the ids of a text to continue, which begin with BOS if the tokenizer adds it.

    With `special` the text of a special token is that token, and a text that begins with BOS's gets
    no second one. An empty text is BOS alone.
    """
    ids = tokenizer.encode(text, bos=tokenizer.adds_bos, special=special)
    twice = special and tokenizer.adds_bos and ids[:2] == [tokenizer.bos_id] * 2
    return ids[1:] if twice else ids or [tokenizer.bos_id]


def choice_ids(
    tokenizer: Tokenizer, prompt: str, choice: str, special: bool = False
) -> tuple[list[int], list[int]]:
    """Returns the ids of a prompt and those of a choice that continues it; together, of the text.

    This is the convention of lm-evaluation-harness: white space at the end of the prompt moves to
    the choice, because most tokens begin with a space and hardly any ends with one. Then both are
    encoded as one text, which begins with the ids of the prompt alone. Where it does not, because a
    token spans the place where they meet, the choice is encoded by itself: the ids still give
    exactly this text, and all choices follow the same ids.
    """
    start = prompt.rstrip()
    rest = prompt[len(start) :] + choice
    before = text_ids(tokenizer, start, special)
    whole = text_ids(tokenizer, start + rest, special)
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, encode_continued(tokenizer, rest, special)
