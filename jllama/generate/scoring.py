"""Logits and log-probabilities of whole texts, in one pass and without a cache.

Texts are right-padded to a bucket of lengths, so that few programs are compiled. This is exact,
because no position attends to a later one. B rows, T positions, C scored tokens of a row, V
vocabulary.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jllama.adapt.lora import Overlay
from jllama.config import ComputeConfig, ModelConfig
from jllama.errors import UserError
from jllama.generate.engine import bucket, traces
from jllama.model import llama
from jllama.model.cross_entropy import default_block
from jllama.model.rope import Turns, depends_on_length, turns
from jllama.parallel.context import context_placement
from jllama.parallel.sharding import Placement, activated

# Tokens of a pass over several rows; a pass has one row if that is longer.
PASS_TOKENS = 8192
# The fewest tokens of a row whose log-probabilities are computed.
SMALLEST_CHOICE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceScore:
    """How likely a model finds a choice after its prompt.

    Attributes:
      ids: the choice's tokens.
      logprobs: of each of them, given the prompt and the tokens before it; natural logarithms.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        """The log-probability of the whole choice: the sum over its tokens."""
        return math.fsum(self.logprobs)


class Reader(NamedTuple):
    """A model that reads whole texts; `overlay` is the argument `lora` of `llama.apply`."""

    params: llama.Params
    config: ModelConfig
    compute: ComputeConfig
    overlay: Overlay | None


def rows_of(tokens: Any, vocab_size: int) -> list[np.ndarray]:
    """The rows of an array of ids [B,T], or of a list of rows of any lengths.

    Raises `UserError` for anything else, an empty row, or an id outside the vocabulary.
    """
    try:
        rows = [np.asarray(row) for row in np.atleast_1d(np.asarray(tokens))]
    except ValueError:  # rows of several lengths
        rows = [_array(row) for row in tokens]
    if not rows:
        raise UserError("logits: no rows; give ids [B,T], or a list of rows of ids")
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.size == 0 or row.dtype.kind not in "iu":
            raise UserError(
                f"logits: expected ids [B,T] or rows of ids, and row {i} is {row.dtype} {row.shape}"
            )
        if row.min() < 0 or row.max() >= vocab_size:
            raise UserError(
                f"logits: row {i} has ids from {row.min()} to {row.max()}, which are not all in the"
                f" vocabulary of {vocab_size}"
            )
    return rows


def _array(row):
    try:
        return np.asarray(row)
    except ValueError:  # a list of lists of several lengths
        return np.asarray(row, object)


def logits(reader: Reader, rows: Sequence[Sequence[int]], length: int | None = None) -> jax.Array:
    """The logits [B,T,V] float32 of rows of ids; T is the bucket of the longest row's length.

    What follows a row's end says nothing. Where RoPE depends on the length of the text, it takes
    `length`, or the row's own length.
    """
    tokens = _padded(rows, _bucket(reader.config, max(map(len, rows))))
    angles = _turns(reader.config, rows, length)
    return _logits(*reader, tokens, angles, placement=context_placement(reader.params))


def logprobs(
    reader: Reader, rows: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[list[float]]:
    """The log-probabilities of the last tokens of each row, given those before them.

    Args:
      rows: ids; rows of several lengths are read together.
      counts: the number of tokens of each row; at least 1, and less than the row has.

    Returns:
      float32 values, of the softmax of the logits [V].
    """
    config, placement = reader.config, context_placement(reader.params)

    def shape(i: int) -> tuple[int, int]:
        return _bucket(config, len(rows[i])), bucket(counts[i], SMALLEST_CHOICE)

    out: list[list[float]] = [[] for _ in rows]
    by_shape = itertools.groupby(sorted(range(len(rows)), key=shape), key=shape)
    for (T, C), alike in [(key, list(group)) for key, group in by_shape]:
        most = max(1, PASS_TOKENS // T)
        for start in range(0, len(alike), most):
            indices = alike[start : start + most]
            batch = [rows[i] for i in indices]
            # The last pass of a shape is filled up with copies of its first row.
            batch += batch[:1] * (min(most, bucket(len(batch), 1)) - len(batch))
            lengths = np.array([len(row) for row in batch], np.int32)
            angles = _turns(config, batch)
            got = _logprobs(*reader, _padded(batch, T), angles, lengths, C, placement=placement)
            for i, values in zip(indices, np.asarray(got).tolist(), strict=False):
                out[i] = values[-counts[i] :]
    return out


def _bucket(config: ModelConfig, length: int) -> int:
    """The padded length of a row: a bucket, but within the model's `max_length` if the row is."""
    return max(length, min(bucket(length), config.max_length))


def _padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    tokens = np.zeros((len(rows), length), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens


def _turns(config: ModelConfig, rows: Sequence[Sequence[int]], length: int | None = None) -> Turns:
    if length is None and depends_on_length(config):
        return turns(config, [len(row) for row in rows])
    return turns(config, length)


def _hidden(params, config, compute, overlay, tokens, angles, placement):
    """Hidden states [B,T,D] of whole rows, from position 0."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    with activated(placement):
        return llama.apply(params, config, compute, tokens, positions, turns=angles, lora=overlay)[
            0
        ]


@functools.partial(jax.jit, static_argnames=("config", "compute", "placement"))
def _logits(
    params: llama.Params,
    config: ModelConfig,
    compute: ComputeConfig,
    overlay: Overlay | None,
    tokens: jax.Array,
    angles: Turns,
    placement: Placement | None,
) -> jax.Array:
    traces["logits"] += 1
    hidden = _hidden(params, config, compute, overlay, tokens, angles, placement)
    with activated(placement):
        return llama.logits(params, config, hidden)


@functools.partial(jax.jit, static_argnames=("config", "compute", "count", "placement"))
def _logprobs(
    params: llama.Params,
    config: ModelConfig,
    compute: ComputeConfig,
    overlay: Overlay | None,
    tokens: jax.Array,
    angles: Turns,
    lengths: jax.Array,
    count: int,
    placement: Placement | None,
) -> jax.Array:
    """The log-probabilities [B,count] float32 of the last tokens of rows with `lengths` [B].

    Where a row has no more than `count` tokens, the first values mean nothing.
    """
    traces["logprobs"] += 1
    hidden = _hidden(params, config, compute, overlay, tokens, angles, placement)
    at = jnp.maximum(lengths[:, None] + jnp.arange(-count, 0), 1)
    targets = jnp.take_along_axis(tokens, at, axis=1)
    hidden = jnp.take_along_axis(hidden, at[..., None] - 1, axis=1)

    def of_position(position):
        hidden, targets = position  # [B,D], [B]
        scores = llama.logits(params, config, hidden[:, None])[:, 0]
        chosen = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(scores, axis=-1)

    # As in the loss, only so many tokens have their logits at a time.
    block = compute.loss_block or default_block()
    together = min(max(1, block // len(tokens)), count)
    positions = hidden.swapaxes(0, 1), targets.T
    return jax.lax.map(of_position, positions, batch_size=together).T
