"""Single-line infilling: a line of a file is the middle, or a span of one; around it the context.

A line without its indentation and line break is wanted, or what stands between two characters of
it; what stands around it, as much of it as a prompt may hold, is given. Beside a model's own
answers stand two that need no infilling: what it writes after the prefix alone, up to the end of
the line (of a span, as many characters as are wanted), and the commonest line of the context.
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

from jllama.config import Source, StdlibSource, TextSource
from jllama.data import text_files
from jllama.data.source import Document, documents
from jllama.errors import UserError
from jllama.files import storage
from jllama.generate.llama import Llama, Mixture
from jllama.text.infill import Infill, encode_continued, infill_tokens
from jllama.text.tokenizer import Tokenizer

WAYS = ("psm", "spm", "prefix", "line")
_LINE = re.compile(r"^[ \t]*(.*\w.*?)[ \t\r]*$", re.MULTILINE)
_MARKS = 5  # BOS, PRE, SUF, MID, and a space that the tokenizer may put before the prefix


@dataclasses.dataclass(frozen=True)
class Problem:
    """`middle` is what stands between `prefix` and `suffix` at the place `where`."""

    prefix: str
    middle: str
    suffix: str
    where: str


@dataclasses.dataclass(frozen=True)
class Score:
    """Over all problems, from 0 to 1.

    Attributes:
      exact: share of the answers that are the middle.
      similarity: mean of 1 - d / n, where d is the Levenshtein distance between answer and middle
        and n the length of the longer one.
      answers: in the order of the problems.
    """

    exact: float
    similarity: float
    answers: tuple[str, ...]


def open_problems(data: str, count: int, spans: bool = False) -> list[Problem]:
    """`count` problems from `data`, all of them if there are fewer.

    Args:
      data: "stdlib" for the held-out files of the standard library; a path or glob of text files;
        or JSON lines with `prompt`, `canonical_solution` and `suffix`, as HumanEval's.
      spans: a span of each line instead of the whole of it.

    Raises UserError if it cannot be read or holds no problem.
    """
    if data.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
        found = pick_problems(_ready_made(data), count)
    else:
        source: Source = TextSource(kind="text", files=(data,))
        if data == "stdlib":
            source = StdlibSource(kind="stdlib", split="held_out")
        found = pick_problems(lines(documents(source)), count)
    if not found:
        raise UserError(f"{data}: no line to fill in it; give files of text")
    return [_span(problem) for problem in found] if spans else found


def lines(texts: Iterable[Document]) -> Iterator[Problem]:
    """Every line with a letter or digit in it, as a problem."""
    for document in texts:
        for match in _LINE.finditer(text := document.text):
            start, stop = match.span(1)
            number = text.count("\n", 0, start) + 1
            where = f"{document.where}:{number}"
            yield Problem(text[:start], match[1], text[stop:], where)


def pick_problems(problems: Iterable[Problem], count: int) -> list[Problem]:
    """`count` of them by a hash of place and line: the same ones on every machine."""

    return heapq.nsmallest(count, problems, key=_digest)


def _digest(problem: Problem) -> bytes:
    return hashlib.sha256(f"{problem.where} {problem.middle}".encode()).digest()


def _span(problem: Problem) -> Problem:
    """What stands between two characters of the middle, which its digest chooses."""
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
    for number, data in text_files.split_file(storage.path(path), b"\n"):
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
                f"{path}:{number}: no infilling problem with prompt, canonical_solution and suffix"
                f" ({type(e).__name__}: {storage.one_line(e)})"
            ) from None
        yield Problem(prefix + middle[:at], line, suffix, f"{path}:{number}")


def within(tokenizer: Tokenizer, problem: Problem, room: int) -> Problem:
    """The problem with as much context as `room` tokens hold: whole lines, nearest first.

    Each side has half of the room, and what the other leaves.
    """
    before = problem.prefix.splitlines(keepends=True)[::-1]
    after = problem.suffix.splitlines(keepends=True)
    sizes = [
        [len(encode_continued(tokenizer, line)) for line in side[:room]] for side in (before, after)
    ]
    need = [sum(side) for side in sizes]
    prefix_room = max(room // 2, room - need[1])
    kept = _fitting(sizes[0], prefix_room)
    left = _fitting(sizes[1], room - sum(sizes[0][:kept]))
    prefix = "".join(before[:kept][::-1])
    return dataclasses.replace(problem, prefix=prefix, suffix="".join(after[:left]))


def _fitting(sizes: Sequence[int], room: int) -> int:
    """How many of the first sizes have room."""
    count = 0
    for size in sizes:
        room -= size
        if room < 0:
            break
        count += 1
    return count


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
    """Greedy answers of one of `WAYS`, scored; of lines without white space at their ends.

    Contexts are the same for every way: what `length` tokens hold beside `max_new_tokens`. Raises
    UserError for a model without infill tokens (psm, spm) or a length that leaves no room.
    `adapter` is that of `Llama.generate`.
    """
    room = length - max_new_tokens - _MARKS
    if max_new_tokens < 1 or room < 2 or length > model.config.max_length:
        raise UserError(
            f"length={length}, max_new_tokens={max_new_tokens}: leave room for a context, within"
            f" the model's max_length={model.config.max_length}"
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
    if way == "prefix" and spans:  # where a span ends cannot be known without the suffix
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
    """The commonest line of the context; of several, the first."""
    counts = collections.Counter(
        line.strip() for line in (problem.prefix + "\n" + problem.suffix).splitlines()
    )
    del counts[""]
    return max(counts, key=counts.__getitem__, default="")
