"""Rewrites the whole documents of a row at read time, as the objective asks.

A document's tokens are decoded to its text, and the text is encoded to other ids, some of which are
predicted. The result is a function of (seed, epoch, document) alone, and does not depend on the
row, its length or the packing.
"""

import abc
import dataclasses
import hashlib
import itertools
import threading

import numpy as np

from jllama.config import InfillObjective, Objective, ReplyObjective
from jllama.data.pack import Row, Rows, empty_row
from jllama.errors import UserError
from jllama.text.infill import document_ids, encode_continued, infill_tokens, random_cuts
from jllama.text.tokenizer import Tokenizer

_SHOWN = 40  # characters of a document, in an error


class Rewriting(abc.ABC):
    """Maps rows to rows, and counts what it does over all threads.

    Attributes:
      gain: number of ids that a document usually gains.
      done: what happens to a document, in the words of the report.
    """

    gain: int
    done: str

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self._tokenizer, self._seed = tokenizer, seed
        self._lock = threading.Lock()
        self._counts = np.zeros(5, np.int64)

    @abc.abstractmethod
    def document(self, tokens: np.ndarray, epoch: int) -> tuple[list[int], int] | None:
        """Rewrites a document, `tokens`, from its beginning on; they end with EOS if the row holds
        its end.

        Returns its new ids and how many of the first ones are not predicted, or None to leave it as
        it is.
        """

    def __call__(self, row: Row, epoch: int) -> Row:
        """Returns the row as it is in this epoch.

        A document whose beginning is in another row stays as it is. What no longer fits into the
        row is cut off at its end.
        """
        length = len(row["tokens"]) - 1
        parts, documents, rewritten = [], 0, 0
        segments = row["segments"]
        # `segments` numbers from 1 and ends in zeros.
        bounds = np.searchsorted(
            segments[: np.count_nonzero(segments)], np.arange(1, segments.max() + 2)
        )
        for start, stop in itertools.pairwise(bounds):
            tokens, weights = row["tokens"][start:stop], row["weights"][start:stop]
            documents += 1
            if self._begins(tokens) and (new := self.document(tokens, epoch)) is not None:
                rewritten += 1
                tokens = np.array(new[0], np.int32)
                weights = (np.arange(len(tokens)) >= new[1]).astype(np.float32)
            parts.append((tokens, weights))
        tokens, weights = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        numbers = np.repeat(np.arange(1, documents + 1), [len(part) for part, _ in parts])
        result, n = empty_row(length), min(len(tokens), length + 1)
        result["tokens"][:n] = tokens[:n]
        result["segments"][:n] = numbers[:n]
        result["weights"][:n] = weights[:n]
        with self._lock:
            lost = np.count_nonzero(weights[n:])
            self._counts += (1, documents, rewritten, np.count_nonzero(weights), lost)
        return result

    def _begins(self, tokens: np.ndarray) -> bool:
        # Text is never encoded to BOS or EOS, so they mark where a document begins and ends. Where
        # the tokenizer adds no BOS, the packing leaves no document without its beginning.
        begins = tokens[0] == self._tokenizer.bos_id or not self._tokenizer.adds_bos
        return len(tokens) > 1 and begins

    def _ends(self, tokens: np.ndarray) -> bool:
        return tokens[-1] == self._tokenizer.eos_id

    def report(self) -> str:
        """Returns one line on what was done until now."""
        with self._lock:
            rows, documents, rewritten, tokens, lost = self._counts.tolist()
        return (
            f"{self.done}: {rewritten:,} of {documents:,} documents in {rows:,} rows;"
            f" {lost:,} of {tokens:,} predicted tokens had no room in their row"
        )


class Infilling(Rewriting):
    """Cuts documents in three and puts the middle last; all tokens but the first are predicted.

    A document that the row does not hold whole stays as it is.
    """

    gain = 6  # three control tokens besides the last, and pieces that a cut splits
    done = "infilling, cut in three"

    def __init__(self, objective: InfillObjective, tokenizer: Tokenizer, seed: int):
        """Raises UserError if the tokenizer has no infill tokens."""
        infill_tokens(tokenizer)
        super().__init__(tokenizer, seed)
        self._objective = objective

    def document(self, tokens: np.ndarray, epoch: int) -> tuple[list[int], int] | None:
        if not self._ends(tokens):
            return None
        digest = hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=16).digest()
        random = np.random.default_rng([self._seed, epoch, *np.frombuffer(digest, "<u4")])
        chosen, spm = random.random(2) < (self._objective.rate, self._objective.spm)
        if not chosen:
            return None
        text = self._tokenizer.decode(tokens.tolist())
        cuts = random_cuts(random, text)
        return document_ids(self._tokenizer, text, cuts, "spm" if spm else "psm"), 1


@dataclasses.dataclass
class _Found:
    """How many documents are of a kind, and the first of them in the source."""

    count: int = 0
    number: int = 0
    text: str = ""

    def add(self, number: int, text: str) -> None:
        if not self.count or number < self.number:  # shards hold them in turn
            self.number, self.text = number, text
        self.count += 1

    @property
    def first(self) -> str:
        return f"document {self.number}, {self.text[:_SHOWN]!r}..."


class Replies(Rewriting):
    """Encodes prompt and reply separately, as when a model replies; only the reply is predicted."""

    gain = 2  # pieces that the cut splits
    done = "replies, predicted after their prompt"

    def __init__(self, objective: ReplyObjective, tokenizer: Tokenizer, seed: int):
        super().__init__(tokenizer, seed)
        self._objective, self._after = objective, objective.after

    def check(self, name: str, rows: Rows, held_out: bool = False) -> bool:
        """Returns whether the marker is in the rows of source `name`.

        Raises UserError if they would teach prompts by mistake. They would where a document lacks
        the marker, and where it has it twice, unless the objective says to predict these. A
        held-out source wholly without the marker is plain text.
        """
        no_marker, second_marker = self._objective.no_marker, self._objective.second_marker
        appears, lacking, repeated = False, _Found(), _Found()
        for number, tokens in rows.documents():
            if appears and no_marker == second_marker == "predict":
                return True
            text = self._tokenizer.decode(tokens.tolist())
            count = text.count(self._after)
            appears = appears or count > 0
            if count > 1:
                repeated.add(number, text)
            elif not count and self._ends(tokens):
                lacking.add(number, text)
        if no_marker == "error" and len(rows) and not (appears or held_out):
            raise UserError(
                f"data.objective.after={self._after!r}: does not appear in the documents of source"
                f" {name}, so that prompts would be predicted too; correct it, or if other sources"
                " have it, set data.objective.no_marker=predict"
            )
        if no_marker == "error" and appears and lacking.count:
            raise UserError(
                f"source {name}: {lacking.first}, lacks {self._after!r} ({lacking.count:,} such"
                " documents), so that its prompt would be predicted too; correct it, or set"
                " data.objective.no_marker=predict, which trains on the whole of such documents"
            )
        if second_marker == "error" and repeated.count:
            times = repeated.text.count(self._after)
            raise UserError(
                f"source {name}: {repeated.first}, has {self._after!r} {times} times"
                f" ({repeated.count:,} such documents), and a document holds one prompt and one"
                " reply, not a conversation: make a document of each pair, or set"
                " data.objective.second_marker=predict, which trains on all after the first, later"
                " prompts too"
            )
        return appears

    def document(self, tokens: np.ndarray, epoch: int) -> tuple[list[int], int] | None:
        text = self._tokenizer.decode(tokens.tolist())
        before, marker, reply = text.partition(self._after)
        if not marker:
            # Without its end it may be a prompt, whose reply was cut off.
            return None if self._ends(tokens) else (tokens.tolist(), len(tokens))
        prompt = self._tokenizer.encode(before + marker, bos=self._tokenizer.adds_bos)
        if self._ends(tokens):
            end = [self._tokenizer.eos_id]
        else:
            end, reply = [], reply.rstrip("\ufffd")  # of a letter that was cut in its bytes
        return [*prompt, *encode_continued(self._tokenizer, reply), *end], len(prompt)


def rewriting(objective: Objective, tokenizer: Tokenizer, seed: int) -> Rewriting | None:
    """Returns what the objective does to rows, or None if it leaves them as they are."""
    match objective:
        case InfillObjective():
            return Infilling(objective, tokenizer, seed)
        case ReplyObjective():
            return Replies(objective, tokenizer, seed)
    return None
