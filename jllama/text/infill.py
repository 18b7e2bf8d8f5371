"""Infilling: a text in three pieces, the middle one last (arXiv:2207.14255, arXiv:2308.12950).

The formats are Code Llama's. enc encodes a text, and enc* encodes it without the space that a
tokenizer may put before a text:

    PSM   BOS PRE enc(prefix) SUF enc*(suffix) MID enc*(middle) EOT
    SPM   BOS PRE SUF enc*(suffix) MID enc(prefix + middle) EOT

A prompt has all but the middle and EOT, and no BOS where the tokenizer adds none. SPM encodes
prefix and middle as one text, so a token may span the place where they meet.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from jllama.errors import UserError
from jllama.files import storage
from jllama.text.interface import TextStream, Tokenizer

InfillFormat = Literal["psm", "spm"]
FILL_ME = "<FILL_ME>"
# An anchor is put before a text that continues another, so that the tokenizer adds its space before
# the anchor. The first is Code Llama's; the others serve if it merges with the text after it.
_ANCHORS = ("☺", "\n", "\ue000")


class InfillTokens(NamedTuple):
    """The ids of the tokens that mark the pieces."""

    prefix: int
    suffix: int
    middle: int
    end: int


# The spelling of Code Llama's tokenizer.model, where they have the ids 32007 to 32010.
EOT = "▁<EOT>"
PIECES = ("▁<PRE>", "▁<SUF>", "▁<MID>", EOT)


@dataclasses.dataclass(frozen=True)
class Infill:
    """A prompt that asks for the text between `prefix` and `suffix`."""

    prefix: str
    suffix: str
    format: InfillFormat = "psm"


def infill_tokens(tokenizer: Tokenizer) -> InfillTokens:
    """Returns the tokenizer's infill ids. Raises UserError if it lacks one of them."""
    known = tokenizer.special_tokens
    if missing := [piece for piece in PIECES if piece not in known]:
        raise UserError(
            f"infilling: the tokenizer has no {', '.join(missing)}; use the tokenizer of a model"
            " that was trained to infill, such as Code Llama 7B or 13B, add the tokens (jllama"
            " vocabulary merge --infill, then grow), or train one with tokenizer.infill=true"
        )
    return InfillTokens(*(known[piece] for piece in PIECES))


def encode_continued(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """Returns enc*(text): the ids of a text that continues another, without a space before it.

    `special` as in `Tokenizer.encode`.
    """
    if not tokenizer.adds_space:
        return tokenizer.encode(text, special=special)
    for anchor in _ANCHORS:
        before, ids = tokenizer.encode(anchor), tokenizer.encode(anchor + text, special=special)
        if ids[: len(before)] == before:
            break
    return ids[len(before) :]


def prompt_ids(tokenizer: Tokenizer, infill: Infill) -> list[int]:
    """Returns the prompt after which a model writes the middle and EOT.

    Raises UserError for an unknown format or a tokenizer without infill tokens.
    """
    if infill.format not in get_args(InfillFormat):
        raise UserError(f"infilling: format {infill.format!r} is unknown; psm or spm")
    pre, suf, mid, _ = infill_tokens(tokenizer)
    prefix = tokenizer.encode(infill.prefix)
    suffix = encode_continued(tokenizer, infill.suffix)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    if infill.format == "psm":
        return [*bos, pre, *prefix, suf, *suffix, mid]
    return [*bos, pre, suf, *suffix, mid, *prefix]


def middle_stream(tokenizer: Tokenizer, infill: Infill) -> TextStream:
    """Returns a stream that decodes what a model writes after `prompt_ids` to the exact middle."""
    # If the encoded text begins with the middle, the tokenizer has put a space before it.
    starts_text = infill.format == "spm" and not infill.prefix
    return tokenizer.stream(after=() if starts_text else tokenizer.encode(_ANCHORS[0]))


def document_ids(
    tokenizer: Tokenizer, text: str, cuts: tuple[int, int], format: InfillFormat
) -> list[int]:
    """Returns the ids of a training document: `text` cut at two characters, the middle last."""
    first, second = cuts
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    end = infill_tokens(tokenizer).end
    if format == "psm":
        prompt = prompt_ids(tokenizer, Infill(prefix, suffix, "psm"))
        return [*prompt, *encode_continued(tokenizer, middle), end]
    return [*prompt_ids(tokenizer, Infill(prefix + middle, suffix, "spm")), end]


def random_cuts(random: np.random.Generator, text: str) -> tuple[int, int]:
    """Draws two places in a text, each uniform from 0 to its length, and returns them in order."""
    first, second = sorted(random.integers(0, len(text), 2, endpoint=True).tolist())
    return first, second


def prompts_from_options(
    prompts: Sequence[tuple[str, str]],
    prefix_file: str | None,
    suffix_file: str | None,
    format: InfillFormat | None,
) -> list[str | Infill]:
    """Returns the prompts of a command line; without any, the empty one.

    One is a text of `prompts`, or asks for the text in place of its `<FILL_ME>`. Or it is the only
    one and asks for the text between the contents of two files.

    Args:
      prompts: pairs of the option that gave a text, for errors, and the text.

    Raises:
      UserError: if `<FILL_ME>` appears twice in a text, if the files are given beside prompts, and
        if a format is given without anything to fill.
    """
    if prefix_file is not None or suffix_file is not None:
        if prompts:
            raise UserError(
                f"{prompts[0][0]}: excludes --prefix-file and --suffix-file; give prompts or these"
                " files"
            )
        prefix, suffix = (
            "" if f is None else storage.read_text(storage.path(f))
            for f in (prefix_file, suffix_file)
        )
        return [Infill(prefix, suffix, format or "psm")]
    parsed = [parse_prompt(option, text, format or "psm") for option, text in prompts]
    if format is not None and not any(isinstance(prompt, Infill) for prompt in parsed):
        raise UserError(f"--infill-format {format}: there is nothing to fill; write {FILL_ME}")
    return parsed or [""]


def parse_prompt(key: str, text: str, format: InfillFormat = "psm") -> str | Infill:
    """Returns a prompt: `text` to continue, or an `Infill` if it holds `<FILL_ME>`.

    Raises UserError, naming `key`, if `<FILL_ME>` appears twice.
    """
    prefix, *rest = text.split(FILL_ME)
    if len(rest) > 1:
        raise UserError(
            f"{key}: {FILL_ME} appears {len(rest)} times, and one place is filled at a time;"
            " leave one of them"
        )
    return Infill(prefix, *rest, format) if rest else text
