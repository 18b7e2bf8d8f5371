"""What an objective makes of rows at read time: it rewrites the whole documents in them.

Prepared data is tokens in their order; here a document's tokens become its text again, and the text
other ids, of which some are predicted. A function of (seed, epoch, document) and of nothing else:
not of the row, its length or the packing.
"""

import abc
import hashlib
import itertools
import threading

import numpy as np

from jllama.config import InfillObjective, Objective, ReplyObjective
from jllama.data.pack import CutRows, Row, Rows, empty_row
from jllama.errors import UserError
from jllama.text.infill import document_ids, encode_continued, infill_tokens, random_cuts
from jllama.text.tokenizer import Tokenizer


class Rewriting(abc.ABC):
    """Rows to rows. Counts what it does, over all threads.

    Attributes:
      gain: ids that a document usually gains.
      done: what is done to a document, for the report.
    """

    gain: int
    done: str

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self._tokenizer, self._seed = tokenizer, seed
        self._lock = threading.Lock()
        self._counts = np.zeros(5, np.int64)

    @abc.abstractmethod
    def document(self, tokens: np.ndarray, epoch: int) -> tuple[list[int], int] | None:
        """The ids of a whole document, and how many of the first are not predicted; None: as it is.

        `tokens` begin with BOS and end with EOS, and so do, or end otherwise, the ids.
        """

    def __call__(self, row: Row, epoch: int) -> Row:
        """The row of this epoch.

        A document of which the row holds but a part stays as it is. What the row cannot hold
        afterwards is left out at its end.
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
            if self._is_whole(tokens) and (new := self.document(tokens, epoch)) is not None:
                rewritten += 1
                tokens = np.array(new[0], np.int32)
                weights = (np.arange(len(tokens)) >= new[1]).astype(np.float32)
            parts.append((tokens, weights))
        tokens, weights = (np.concatenate(some) for some in zip(*parts, strict=True))
        numbers = np.repeat(np.arange(1, documents + 1), [len(part) for part, _ in parts])
        result, n = empty_row(length), min(len(tokens), length + 1)
        result["tokens"][:n] = tokens[:n]
        result["segments"][:n] = numbers[:n]
        result["weights"][:n] = weights[:n]
        with self._lock:
            lost = np.count_nonzero(weights[n:])
            self._counts += (1, documents, rewritten, np.count_nonzero(weights), lost)
        return result

    def _is_whole(self, tokens: np.ndarray) -> bool:
        # Neither is made from text, so each stands only where a document begins or ends.
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        return len(tokens) > 1 and tokens[0] == bos and tokens[-1] == eos

    def report(self) -> str:
        """What was done until now, in a line."""
        with self._lock:
            rows, documents, rewritten, tokens, lost = self._counts.tolist()
        return (
            f"{self.done}: {rewritten:,} of {documents:,} documents in {rows:,} rows;"
            f" {lost:,} of {tokens:,} predicted tokens had no room in their row"
        )


class Infilling(Rewriting):
    """Cut in three with the middle last; every token but the first is predicted."""

    gain = 6  # three more control tokens than EOS, and pieces cut in two
    done = "infilling, cut in three"

    def __init__(self, objective: InfillObjective, tokenizer: Tokenizer, seed: int):
        """Raises UserError if the tokenizer has no infill tokens."""
        infill_tokens(tokenizer)
        super().__init__(tokenizer, seed)
        self._objective = objective

    def document(self, tokens: np.ndarray, epoch: int) -> tuple[list[int], int] | None:
        document = hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=16).digest()
        random = np.random.default_rng([self._seed, epoch, *np.frombuffer(document, "<u4")])
        chosen, spm = random.random(2) < (self._objective.rate, self._objective.spm)
        if not chosen:
            return None
        text = self._tokenizer.decode(tokens.tolist())
        cuts = random_cuts(random, text)
        return document_ids(self._tokenizer, text, cuts, "spm" if spm else "psm"), 1


class Replies(Rewriting):
    """Prompt and reply, encoded apart as they are when a model replies; the reply is predicted."""

    gain = 2  # pieces cut in two
    done = "replies, predicted after their prompt"

    def __init__(self, objective: ReplyObjective, tokenizer: Tokenizer, seed: int):
        super().__init__(tokenizer, seed)
        self._after = objective.after

    def check(self, name: str, rows: Rows) -> None:
        """Raises UserError for rows of a source in which no reply is found."""
        if isinstance(rows, CutRows):
            raise UserError(
                "data.objective.kind=reply: needs data.packing.kind=whole, as a part of a document"
                " does not say what in it is a reply"
            )
        first = range(min(len(rows), 64))
        if not any(
            self._after in self._tokenizer.decode(rows[i]["tokens"].tolist()) for i in first
        ):
            raise UserError(
                f"data.objective.after={self._after!r}: stands nowhere in the first {len(first)}"
                f" rows of source {name}; every prompt would be predicted"
            )

    def document(self, tokens: np.ndarray, epoch: int) -> tuple[list[int], int] | None:
        text = self._tokenizer.decode(tokens.tolist())
        before, marker, reply = text.partition(self._after)
        if not marker:
            return None
        prompt = self._tokenizer.encode(before + marker, bos=True)
        reply = encode_continued(self._tokenizer, reply)
        return [*prompt, *reply, self._tokenizer.eos_id], len(prompt)


def rewriting(objective: Objective, tokenizer: Tokenizer, seed: int) -> Rewriting | None:
    """What the objective does to rows; None if nothing."""
    match objective:
        case InfillObjective():
            return Infilling(objective, tokenizer, seed)
        case ReplyObjective():
            return Replies(objective, tokenizer, seed)
    return None
