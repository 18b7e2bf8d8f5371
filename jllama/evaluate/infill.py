"""Evaluates single-line infilling: a model fills in a line of a file, or a span of a line.

The middle is a line without its indentation and line break, or a span of such a line. The context
is the text around it, as much as a prompt may hold. Two baselines need no infilling: what the model
writes after the prefix alone, up to the end of the line (for a span, as many characters as the
middle has), and the commonest line of the context.
"""

import collections
import dataclasses
import hashlib
import heapq
import json
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

from jllama.adapt.mixture import Mixture
from jllama.config import Source, StdlibSource, TextSource
from jllama.data import text_files
from jllama.data.source import Document, documents
from jllama.errors import UserError
from jllama.files import storage
from jllama.generate.llama import Llama
from jllama.text.infill import Infill, encode_continued, infill_tokens
from jllama.text.tokenizer import Tokenizer

WAYS = ("psm", "spm", "prefix", "line")
_JSONL = re.compile(r"\.jsonl(\.(gz|zst|bz2|xz))?$", re.IGNORECASE)
_LINE = re.compile(r"^[ \t]*(.*\w.*?)[ \t\r]*$", re.MULTILINE)
_MARKS = 5  # BOS, PRE, SUF, MID, and a space that the tokenizer may insert before the prefix


@dataclasses.dataclass(frozen=True)
class Problem:
    """A text `prefix + middle + suffix`, of which `middle` is to be filled in, from `where`."""

    prefix: str
    middle: str
    suffix: str
    where: str


@dataclasses.dataclass(frozen=True)
class Score:
    """The scores of the answers to all problems, from 0 to 1.

    Attributes:
      exact: share of the answers that equal the middle.
      similarity: mean of 1 - d / n, where d is the Levenshtein distance between answer and middle
        and n the length of the longer one.
      answers: in the order of the problems.
    """

    exact: float
    similarity: float
    answers: tuple[str, ...]


def open_problems(data: str, count: int, spans: bool = False) -> list[Problem]:
    """`count` problems from `data`, or all if there are fewer.

    Args:
      data: "stdlib" for the held-out files of the standard library; a path or glob of text files;
        or JSON lines with `prompt`, `canonical_solution` and `suffix`, as HumanEval's.
      spans: take a span of each line as the middle instead of the whole line.

    Raises UserError if the data cannot be read or hold no problem.
    """
    if _JSONL.search(data):
        problems = pick_problems(_ready_made(data), count)
    else:
        source: Source = TextSource(kind="text", files=(data,))
        if data == "stdlib":
            source = StdlibSource(kind="stdlib", split="held_out")
        problems = pick_problems(lines(documents(source)), count)
    if not problems:
        raise UserError(f"{data}: has no line to fill in; give files of text")
    return [_span(problem) for problem in problems] if spans else problems


def lines(texts: Iterable[Document]) -> Iterator[Problem]:
    """A problem for every line that has a letter or digit."""
    for document in texts:
        for match in _LINE.finditer(text := document.text):
            start, stop = match.span(1)
            number = text.count("\n", 0, start) + 1
            where = f"{document.where}:{number}"
            yield Problem(text[:start], match[1], text[stop:], where)


def pick_problems(problems: Iterable[Problem], count: int) -> list[Problem]:
    """`count` problems, chosen by a hash of place and line: the same on every machine."""
    return heapq.nsmallest(count, problems, key=_digest)


def _digest(problem: Problem) -> bytes:
    return hashlib.sha256(f"{problem.where} {problem.middle}".encode()).digest()


def _span(problem: Problem) -> Problem:
    """The problem with a span of its middle as the middle; its digest seeds the choice."""
    line = problem.middle
    random = np.random.default_rng(np.frombuffer(_digest(problem), "<u4"))
    first, second = sorted(random.choice(len(line) + 1, 2, replace=False).tolist())
    return dataclasses.replace(
        problem,
        prefix=problem.prefix + line[:first],
        middle=line[first:second],
        suffix=line[second:] + problem.suffix,
    )


def _ready_made(path: str) -> Iterator[Problem]:
    for number, data in text_files.split(text_files.read_chunks(storage.path(path)), b"\n"):
        if not data.strip():
            continue
        try:
            record = json.loads(data)
            prefix, middle = record["prompt"], record["canonical_solution"]
            line = middle.strip()
            if not line:
                raise ValueError("canonical_solution is empty")
            at = middle.index(line)
            suffix = middle[at + len(line) :] + record["suffix"]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(
                f"{path}:{number}: not a problem with prompt, canonical_solution and suffix"
                f" ({type(e).__name__}: {storage.one_line(e)})"
            ) from None
        yield Problem(prefix + middle[:at], line, suffix, f"{path}:{number}")


def within(tokenizer: Tokenizer, problem: Problem, room: int) -> Problem:
    """The problem with as much context as fits in `room` tokens: whole lines, nearest first.

    Each side gets half of the room, and what the other side leaves.
    """
    before = problem.prefix.splitlines(keepends=True)[::-1]
    after = problem.suffix.splitlines(keepends=True)
    sizes = [
        [len(encode_continued(tokenizer, line)) for line in side[:room]] for side in (before, after)
    ]
    need = [sum(side) for side in sizes]
    prefix_room = max(room // 2, room - need[1])
    lines_before = _fitting(sizes[0], prefix_room)
    lines_after = _fitting(sizes[1], room - sum(sizes[0][:lines_before]))
    prefix = "".join(before[:lines_before][::-1])
    return dataclasses.replace(problem, prefix=prefix, suffix="".join(after[:lines_after]))


def _fitting(sizes: Sequence[int], room: int) -> int:
    """The largest number of leading sizes whose sum is at most `room`."""
    return int(np.searchsorted(np.cumsum(sizes), room, side="right"))


def evaluate(
    model: Llama,
    problems: Sequence[Problem],
    way: str,
    *,
    length: int,
    max_new_tokens: int,
    batch_size: int = 16,
    spans: bool = False,
    adapter: Mixture = None,
) -> Score:
    """The score of the greedy answers in one of `WAYS`; whole lines are stripped of white space.

    Every way sees the same contexts: as much as fits in `length` tokens with `max_new_tokens`.
    `adapter` is the argument of `Llama.generate`. Raises UserError for a model without infill
    tokens (psm, spm), or a length that leaves no room for a context.
    """
    room = length - max_new_tokens - _MARKS
    if max_new_tokens < 1 or room < 2 or length > model.config.max_length:
        raise UserError(
            f"length={length}, max_new_tokens={max_new_tokens}: must leave room for a context, and"
            f" length must be within the model's max_length={model.config.max_length}"
        )
    shown = [within(model.tokenizer, problem, room) for problem in problems]
    if way == "line":
        answers = [_commonest(p) for p in shown]
    else:
        if way != "prefix":
            infill_tokens(model.tokenizer)
        prompts = [p.prefix if way == "prefix" else Infill(p.prefix, p.suffix, way) for p in shown]
        answers = model.generate(
            prompts,
            temperature=0.0,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            adapter=adapter,
        )
    wanted = [p.middle for p in problems]
    if way == "prefix":
        answers = [answer.partition("\n")[0] for answer in answers]
    if way == "prefix" and spans:  # without the suffix the model cannot know where a span ends
        answers = [answer[: len(middle)] for answer, middle in zip(answers, wanted, strict=True)]
    if not spans:
        answers = [answer.strip() for answer in answers]
    pairs = list(zip(answers, wanted, strict=True))
    return Score(
        exact=sum(a == b for a, b in pairs) / len(pairs),
        similarity=sum(Levenshtein.normalized_similarity(a, b) for a, b in pairs) / len(pairs),
        answers=tuple(answers),
    )


def _commonest(problem: Problem) -> str:
    """The commonest line of the context; the first of those that are equally common."""
    counts = collections.Counter(
        line.strip() for line in (problem.prefix + "\n" + problem.suffix).splitlines()
    )
    del counts[""]
    return max(counts, key=counts.__getitem__, default="")
