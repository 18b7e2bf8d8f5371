"""Infilling: a text in three pieces, the middle one last (arXiv:2207.14255, arXiv:2308.12950).

Ids are those of Code Llama. With enc* for an encoding without the space that a tokenizer may put
before a text:

    PSM   BOS PRE enc(prefix) SUF enc*(suffix) MID enc*(middle) EOT
    SPM   BOS PRE SUF enc*(suffix) MID enc(prefix + middle) EOT

A prompt is the same without the middle and EOT. In SPM prefix and middle are one text, so no token
ends where the one meets the other.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from jllama.errors import UserError
from jllama.files import storage
from jllama.text.interface import TextStream, Tokenizer

InfillFormat = Literal["psm", "spm"]
FILL_ME = "<FILL_ME>"
_FORMATS = ("psm", "spm")
# Put before a text that goes on from another: Code Llama's, and others where a vocabulary has
# pieces that join it with what follows.
_ANCHORS = ("☺", "\n", "\ue000")


class InfillTokens(NamedTuple):
    """The ids that mark the pieces."""

    prefix: int
    suffix: int
    middle: int
    end: int


# As Code Llama's tokenizer.model spells them: 32007 to 32010 there.
EOT = "▁<EOT>"
PIECES = ("▁<PRE>", "▁<SUF>", "▁<MID>", EOT)


@dataclasses.dataclass(frozen=True)
class Infill:
    """A prompt of which the middle is wanted."""

    prefix: str
    suffix: str
    format: InfillFormat = "psm"


def infill_tokens(tokenizer: Tokenizer) -> InfillTokens:
    """The tokenizer's infill ids, by name. Raises UserError if it lacks one of them."""
    known = tokenizer.special_tokens
    if missing := [piece for piece in PIECES if piece not in known]:
        raise UserError(
            f"infilling: the tokenizer has no {', '.join(missing)}; take one of a model made for"
            " infilling, as Code Llama's 7B and 13B, add them (jllama vocabulary merge --infill,"
            " then grow), or train it with tokenizer.infill=true"
        )
    return InfillTokens(*(known[piece] for piece in PIECES))


def encode_continued(tokenizer: Tokenizer, text: str) -> list[int]:
    """enc*: the ids of a text that goes on from another, without a space that is not in it."""
    if not tokenizer.adds_space:
        return tokenizer.encode(text)
    for anchor in _ANCHORS:
        before, ids = tokenizer.encode(anchor), tokenizer.encode(anchor + text)
        if ids[: len(before)] == before:
            break
    return ids[len(before) :]


def prompt_ids(tokenizer: Tokenizer, infill: Infill) -> list[int]:
    """The prompt after which a model writes the middle and EOT. Raises UserError."""
    if infill.format not in _FORMATS:
        raise UserError(f"infilling: format {infill.format!r} is unknown; psm or spm")
    pre, suf, mid, _ = infill_tokens(tokenizer)
    prefix = tokenizer.encode(infill.prefix)
    suffix = encode_continued(tokenizer, infill.suffix)
    if infill.format == "psm":
        return [tokenizer.bos_id, pre, *prefix, suf, *suffix, mid]
    return [tokenizer.bos_id, pre, suf, *suffix, mid, *prefix]


def middle_stream(tokenizer: Tokenizer, infill: Infill) -> TextStream:
    """Turns the ids that a model writes after `prompt_ids` into the middle, exactly."""
    # Where the middle begins a text of its own, its first space is the tokenizer's.
    begins = infill.format == "spm" and not infill.prefix
    return tokenizer.stream(after=() if begins else tokenizer.encode(_ANCHORS[0]))


def document_ids(
    tokenizer: Tokenizer, text: str, cuts: tuple[int, int], format: InfillFormat
) -> list[int]:
    """A training document: `text` cut at two characters, its middle written last, then EOT."""
    first, second = cuts
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    end = infill_tokens(tokenizer).end
    if format == "psm":
        prompt = prompt_ids(tokenizer, Infill(prefix, suffix, "psm"))
        return [*prompt, *encode_continued(tokenizer, middle), end]
    return [*prompt_ids(tokenizer, Infill(prefix + middle, suffix, "spm")), end]


def random_cuts(random: np.random.Generator, text: str) -> tuple[int, int]:
    """Two places among the characters of a text, in order: each uniform from 0 to its length."""
    first, second = sorted(random.integers(0, len(text), 2, endpoint=True).tolist())
    return first, second


def prompt_from_options(
    prompt: str, prefix_file: str | None, suffix_file: str | None, format: InfillFormat | None
) -> str | Infill:
    """What a command line asks for: `prompt`, the place of its `<FILL_ME>`, or that between files.

    Raises UserError for `<FILL_ME>` twice, files beside a prompt, and a format without infilling.
    """
    if prefix_file is not None or suffix_file is not None:
        if prompt:
            raise UserError(
                "--prompt: stands beside --prefix-file or --suffix-file; give it or them, not both"
            )
        prefix, suffix = ("" if f is None else _read(f) for f in (prefix_file, suffix_file))
        return Infill(prefix, suffix, format or "psm")
    asked = parse_prompt("--prompt", prompt, format or "psm")
    if format is not None and asked == prompt:
        raise UserError(f"--infill-format {format}: there is nothing to fill; write {FILL_ME}")
    return asked


def parse_prompt(key: str, text: str, format: InfillFormat = "psm") -> str | Infill:
    """What a prompt asks for: its continuation, or the place of its `<FILL_ME>`.

    Raises UserError, naming the key that it is the value of, for `<FILL_ME>` twice.
    """
    prefix, *rest = text.split(FILL_ME)
    if len(rest) > 1:
        raise UserError(
            f"{key}: {FILL_ME} stands in it {len(rest)} times; one place is filled at a time,"
            " leave one"
        )
    return Infill(prefix, *rest, format) if rest else text


def _read(file: str) -> str:
    try:
        return storage.read_text(storage.path(file))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
