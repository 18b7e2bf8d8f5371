"""Infilling at read time: the whole documents of a row, cut in three and put in another order.

Prepared data is tokens in their order; here a document's tokens become its text again, and the text
the ids of `jllama.text.infill`. A function of (seed, epoch, document) and of nothing else: not of
the row, its length or the packing.
"""

import hashlib
import itertools
import threading

import numpy as np

from jllama.config import InfillObjective
from jllama.data.pack import Row, empty_row
from jllama.text.infill import document_ids, infill_tokens, random_cuts
from jllama.text.tokenizer import Tokenizer

# Ids that a document usually gains: three more control tokens than EOS, and pieces cut in two.
GAIN = 6


class Infilling:
    """Rows to rows. Counts what it does, over all threads."""

    def __init__(self, objective: InfillObjective, tokenizer: Tokenizer, seed: int):
        """Raises UserError if the tokenizer has no infill tokens."""
        infill_tokens(tokenizer)
        self._objective, self._tokenizer, self._seed = objective, tokenizer, seed
        self._lock = threading.Lock()
        self._counts = np.zeros(5, np.int64)

    def __call__(self, row: Row, epoch: int) -> Row:
        """The row of this epoch: every token of a cut document but its first is predicted.

        A document of which the row holds but a part stays as it is. What the row cannot hold
        afterwards is left out at its end.
        """
        length = len(row["tokens"]) - 1
        parts, documents, cut = [], 0, 0
        segments = row["segments"]
        # `segments` numbers from 1 and ends in zeros.
        bounds = np.searchsorted(
            segments[: np.count_nonzero(segments)], np.arange(1, segments.max() + 2)
        )
        for start, stop in itertools.pairwise(bounds):
            tokens, weights = row["tokens"][start:stop], row["weights"][start:stop]
            documents += 1
            if self._is_whole(tokens) and (ids := self._cut(tokens, epoch)) is not None:
                cut += 1
                tokens, weights = ids, np.ones(len(ids), np.float32)
                weights[0] = 0
            parts.append((tokens, weights))
        tokens, weights = (np.concatenate(some) for some in zip(*parts, strict=True))
        numbers = np.repeat(np.arange(1, documents + 1), [len(part) for part, _ in parts])
        result, n = empty_row(length), min(len(tokens), length + 1)
        result["tokens"][:n] = tokens[:n]
        result["segments"][:n] = numbers[:n]
        result["weights"][:n] = weights[:n]
        with self._lock:
            lost = np.count_nonzero(weights[n:])
            self._counts += (1, documents, cut, np.count_nonzero(weights), lost)
        return result

    def _is_whole(self, tokens: np.ndarray) -> bool:
        # Neither is made from text, so each stands only where a document begins or ends.
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        return len(tokens) > 1 and tokens[0] == bos and tokens[-1] == eos

    def _cut(self, tokens: np.ndarray, epoch: int) -> np.ndarray | None:
        """The ids of a whole document with its middle last; None if it is not to be cut."""
        document = hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=16).digest()
        random = np.random.default_rng([self._seed, epoch, *np.frombuffer(document, "<u4")])
        chosen, spm = random.random(2) < (self._objective.rate, self._objective.spm)
        if not chosen:
            return None
        text = self._tokenizer.decode(tokens.tolist())
        cuts = random_cuts(random, text)
        return np.array(
            document_ids(self._tokenizer, text, cuts, "spm" if spm else "psm"), np.int32
        )

    def report(self) -> str:
        """What was done until now, in a line."""
        with self._lock:
            rows, documents, cut, tokens, lost = self._counts.tolist()
        return (
            f"infilling: {cut:,} of {documents:,} documents in {rows:,} rows were cut in three;"
            f" {lost:,} of {tokens:,} tokens had no room in their row"
        )
