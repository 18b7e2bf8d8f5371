"""Completions: the text, ids and log-probabilities of a request, made from its events one by one.

A stop string ends a text where it begins. Text that may be its beginning is held back until more is
known, so that a stream never shows a part of one, whatever tokens it is made of.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from jllama.errors import UserError
from jllama.generate.engine import Event, FinishReason
from jllama.generate.sampling import Sampling
from jllama.text.interface import TextStream

# New tokens when nobody says how many; fewer where the model has no room for them.
DEFAULT_NEW_TOKENS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings(Sampling):
    """How to continue a prompt; raises `UserError` for an impossible value.

    Its defaults are those of `jllama.load(...).generate` and of sample.py.

    Attributes:
      max_new_tokens: the most tokens; None is `DEFAULT_NEW_TOKENS`, or what the model's
        `max_length` leaves.
      stop: a text or several; a continuation ends before the first of them.
      special: whether the text of a special token in a prompt is that token. The texts of an
        `Infill` have none.
      seed: from 0 to 2^32 - 1.
    """

    max_new_tokens: int | None = None
    stop: str | Sequence[str] = ()
    special: bool = False
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop={list(stop)}: must be texts, and none of them empty")
        object.__setattr__(self, "stop", stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A continuation of a prompt.

    Attributes:
      text: without the stop id or the stop string that ended it.
      ids: the tokens of the text. If a stop string begins inside the last one, `text` has only what
        is before it.
      logprobs: of each of `ids`; see `jllama.generate.engine.Event`.
      finish_reason: "stop" at a stop id or a stop string, "length" at `max_new_tokens`.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


class CompletionWriter:
    """Makes one `Completion`; `finish_reason` is None until it is whole."""

    def __init__(self, stream: TextStream, stop: Sequence[str] = ()):
        self._stream, self._stop = stream, stop
        self._pieces: list[str] = []
        self._length = 0  # characters in all pieces
        self._held = ""  # what follows them and may begin a stop string
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._starts: list[int] = []  # the length of the text before each token
        self.finish_reason: FinishReason | None = None

    def feed(self, token: int, logprob: float) -> str:
        """Adds a token; returns the text that is certain by now and was not before."""
        self._ids.append(token)
        self._logprobs.append(logprob)
        self._starts.append(self._length + len(self._held))
        return self._add(self._stream.feed(token))

    def end(self, reason: FinishReason) -> str:
        """Ends the text, and returns the rest of it."""
        rest = self._add(self._stream.end())
        if self.finish_reason is None:  # else the rest ended with a stop string
            self.finish_reason = reason
            rest += self._release(len(self._held))
        return rest

    def completion(self) -> Completion:
        return Completion(
            text="".join(self._pieces),
            ids=tuple(self._ids),
            logprobs=tuple(self._logprobs),
            finish_reason=self.finish_reason,
        )

    def _add(self, text: str) -> str:
        self._held += text
        places = [(self._held.find(stop), stop) for stop in self._stop]
        # The first that is whole, reading character by character: tokens do not matter.
        ends = [(at + len(stop), at) for at, stop in places if at >= 0]
        if not ends:
            return self._release(len(self._held) - _begun(self._held, self._stop))
        _, at = min(ends)
        self.finish_reason = "stop"
        released = self._release(at)
        count = bisect.bisect_left(self._starts, self._length)
        del self._ids[count:], self._logprobs[count:]
        return released

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        self._pieces.append(released)
        self._length += count
        return released


def _begun(text: str, stop: Sequence[str]) -> int:
    """How many of the last characters of `text` are the beginning of a stop string."""
    lengths = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return max(lengths, default=0)


def write(
    events: Iterable[Event], writers: Sequence[CompletionWriter], cancelled: set[int]
) -> Iterator[str]:
    """Feeds the events of several requests to a writer each; yields what these return.

    `cancelled` is the engine's: a request that has reached a stop string is added to it.
    """
    for event in events:
        writer = writers[event.index]
        if event.token is None:
            yield writer.end(event.finish_reason)
            continue
        piece = writer.feed(event.token, event.logprob)
        if writer.finish_reason:
            cancelled.add(event.index)
        yield piece
