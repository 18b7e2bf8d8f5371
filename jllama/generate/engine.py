"""Decoding with a key/value cache, of token ids only.

Prompts are right-padded to a bucket of lengths and the cache's length is a bucket too, so prefill
and decode are compiled once per bucket, whatever the prompts and the settings. B requests, T prompt
positions of one chunk, S cache slots, V vocabulary.
"""

import collections
import dataclasses
import functools
import itertools
import zlib
from collections.abc import Container, Iterator, Sequence
from typing import Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jllama.adapt.lora import Overlay
from jllama.adapt.mixture import weighted
from jllama.config import ComputeConfig, ModelConfig
from jllama.errors import UserError
from jllama.generate.sampling import Sampling, SamplingArrays, sample, stack
from jllama.model.attention import Cache, init_cache
from jllama.model.llama import Params, apply, logits
from jllama.model.rope import Turns, depends_on_length, grows, turns

SMALLEST_BUCKET = 32
# Longer prompts are prefilled in chunks of this length: scores take chunk * S memory, not T * S.
LARGEST_CHUNK = 512

# How often each function was traced, which is how often it was compiled.
traces: collections.Counter[str] = collections.Counter()

# Why a text ended: at a stop id or a stop string, or because it has all of its `max_new_tokens`.
FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One text to generate; it depends on these fields alone, and not on the rest of the batch.

    Equal requests give the same tokens; for different ones give them different `number`s. A RoPE
    that depends on the length of the text takes the prompt's length plus `max_new_tokens`.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    mixture: tuple[float, ...] = ()  # weight of each overlay
    sampling: Sampling = Sampling()
    stop: frozenset[int] = frozenset()
    seed: int = 0
    number: int = 0


class Event(NamedTuple):
    """A token that was drawn for a request; or, where `token` is None, the end of the request.

    Attributes:
      index: which of the requests.
      logprob: the natural logarithm, a float32, of the probability that the model gives the token:
        by the softmax of its logits [V], before penalty, temperature, top-k and top-p. None at the
        end.
      finish_reason: None for a token.
    """

    index: int
    token: int | None
    logprob: float | None = None
    finish_reason: FinishReason | None = None


@flax.struct.dataclass
class _Model:
    """What all requests share; `overlays` as `jllama.adapt.mixture.join_overlays` makes them."""

    params: Params
    overlays: Overlay | None
    config: ModelConfig = flax.struct.field(pytree_node=False)
    compute: ComputeConfig = flax.struct.field(pytree_node=False)


class _PerRow(NamedTuple):
    """Arrays that differ from row to row, or None where all rows are alike: the turns of RoPE if
    they depend on the length, and the weights of the overlays [B,E]."""

    turns: Turns | None
    mixture: np.ndarray | None


def _apply(model, tokens, positions, cache, per_row):
    overlay = weighted(model.overlays, per_row.mixture) if model.overlays else None
    where = {"cache": cache, "turns": per_row.turns, "lora": overlay}
    return apply(model.params, model.config, model.compute, tokens, positions, **where)


def bucket(length: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The least power of two that holds `length`, from `smallest` up."""
    return max(smallest, 1 << (length - 1).bit_length())


# One program each for what a generation begins with: an operation by itself is compiled by itself.
@functools.partial(jax.jit, static_argnums=range(5))
def _empty(
    config: ModelConfig, compute: ComputeConfig, batch: int, slots: int, vocab_size: int
) -> tuple[Cache, jax.Array, jax.Array]:
    """The arguments `cache`, `seen` and `last` of the first `_prefill`."""
    seen = jnp.zeros((batch, vocab_size), bool)
    last = jnp.zeros((batch, config.hidden_dim), compute.dtype)
    return init_cache(config, compute, batch, slots), seen, last


@jax.jit
@jax.vmap
def _keys(seed: jax.Array, prompt: jax.Array, number: jax.Array) -> jax.Array:
    """Each request's random key."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), number)


@functools.partial(jax.jit, donate_argnames=("cache", "seen"))
def _prefill(
    model: _Model,
    cache: Cache,
    seen: jax.Array,
    last: jax.Array,
    tokens: jax.Array,
    start: jax.Array,
    lengths: jax.Array,
    per_row: _PerRow,
) -> tuple[Cache, jax.Array, jax.Array]:
    """Reads one chunk of the prompts: tokens [B,T] at positions start..start+T-1.

    Padding beyond `lengths` [B] writes cache slots that decoding overwrites before it reads them.
    Returns the cache, `seen` [B,V], and `last` [B,D], the hidden state of each prompt's last token
    as soon as its chunk was read. It donates `cache` and `seen`.
    """
    traces["prefill"] += 1
    B, T = tokens.shape
    positions = jnp.broadcast_to(start + jnp.arange(T), (B, T))
    hidden, cache = _apply(model, tokens, positions, cache, per_row)
    rows = jnp.arange(B)
    seen = seen.at[rows[:, None], tokens].max(positions < lengths[:, None])
    offset = lengths - 1 - start
    in_chunk = (offset >= 0) & (offset < T)
    last = jnp.where(in_chunk[:, None], hidden[rows, jnp.clip(offset, 0, T - 1)], last)
    return cache, seen, last


def _next(model, hidden, positions, seen, keys, settings):
    """Draws the token [B] at `positions` from hidden states [B,D], and adds it to `seen`.

    Returns the token, its log-probability [B] float32 and `seen`.
    """
    scores = logits(model.params, model.config, hidden[:, None])[:, 0]
    # A token's random key depends on its position, and not on the batch or on when it is drawn.
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    token = sample(keys, scores[:, : seen.shape[1]], seen, settings)
    rows = jnp.arange(token.shape[0])
    logprob = scores[rows, token] - jax.nn.logsumexp(scores, axis=-1)
    return token, logprob, seen.at[rows, token].set(True)


@functools.partial(jax.jit, donate_argnames=("seen",))
def _first(
    model: _Model,
    last: jax.Array,
    positions: jax.Array,
    seen: jax.Array,
    keys: jax.Array,
    settings: SamplingArrays,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first new token [B], its log-probability, and `seen` with it added. It donates `seen`."""
    traces["first"] += 1
    return _next(model, last, positions, seen, keys, settings)


@functools.partial(jax.jit, donate_argnames=("cache", "seen"))
def _decode(
    model: _Model,
    cache: Cache,
    seen: jax.Array,
    token: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    settings: SamplingArrays,
    per_row: _PerRow,
) -> tuple[Cache, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Reads `token` [B] at `positions` [B].

    Returns cache, seen, and of the next token: its id, its log-probability and its position. It
    donates `cache` and `seen`.
    """
    traces["decode"] += 1
    hidden, cache = _apply(model, token[:, None], positions[:, None], cache, per_row)
    # A finished row stays on the last slot until the others are done.
    positions = jnp.minimum(positions + 1, cache.k.shape[3] - 1)
    token, logprob, seen = _next(model, hidden[:, 0], positions, seen, keys, settings)
    return cache, seen, token, logprob, positions


@jax.jit
def _take(cache: Cache, rows: jax.Array) -> Cache:
    return jax.tree.map(lambda x: x[:, rows], cache)


def stream(
    params: Params,
    config: ModelConfig,
    compute: ComputeConfig,
    requests: Sequence[Request],
    vocab_size: int | None = None,
    overlays: Overlay | None = None,
    cancelled: Container[int] = (),
) -> Iterator[Event]:
    """Generates for all requests at once; yields tokens as they are drawn, and each request's end.

    A request ends when it draws one of its stop ids, which is not yielded, or has all of its
    `max_new_tokens`. Equal prompts with the same RoPE and mixture are prefilled once.

    Args:
      vocab_size: only ids below it are drawn or accepted in prompts; default the model's.
      overlays: from `jllama.adapt.mixture.join_overlays`; a request's `mixture` weighs them.
      cancelled: indices of requests that the caller has ended. It may add one after any event: no
        other event of that request comes.

    Raises:
      UserError: before the first token, if a prompt is empty, holds an id that is not in the
        vocabulary, or does not fit the model's `max_length` together with its new tokens.
    """
    vocab_size = vocab_size or config.vocab_size
    for i, request in enumerate(requests):
        _check(request, config.max_length, vocab_size, where=f"prompt {i}")
    model = _Model(params, overlays, config, compute)
    return _run(model, list(requests), vocab_size, cancelled)


def generate(
    params: Params,
    config: ModelConfig,
    compute: ComputeConfig,
    requests: Sequence[Request],
    vocab_size: int | None = None,
    overlays: Overlay | None = None,
) -> list[list[int]]:
    """The new tokens of each request, without its stop id; see `stream`."""
    out: list[list[int]] = [[] for _ in requests]
    for event in stream(params, config, compute, requests, vocab_size, overlays):
        if event.token is not None:
            out[event.index].append(event.token)
    return out


def _check(request: Request, max_length: int, vocab_size: int, where: str) -> None:
    prompt, new = request.prompt, request.max_new_tokens
    if not 0 <= request.seed < 2**32:
        raise UserError(f"seed={request.seed}: must be from 0 to 2^32 - 1")
    if new < 0:
        raise UserError(f"max_new_tokens={new}: must be 0 or above")
    if len(prompt) == 0:
        raise UserError(f"{where} is empty; begin with the BOS id")
    if bad := [token for token in prompt if not 0 <= token < vocab_size]:
        raise UserError(f"{where}: id {bad[0]} is not in the vocabulary of {vocab_size}")
    if len(prompt) + new > max_length:
        raise UserError(
            f"{where}: {len(prompt)} tokens and {new} new ones exceed the model's"
            f" max_length={max_length}: shorten the prompt or lower max_new_tokens; a model that"
            " reads further is loaded with another max_length (--max-length)"
        )


def _run(model, requests, vocab_size, cancelled):
    config = model.config
    for i, request in enumerate(requests):
        if request.max_new_tokens == 0:
            yield Event(i, None, finish_reason="length")
    alive = [i for i, request in enumerate(requests) if request.max_new_tokens > 0]
    if not alive:
        return
    live = [requests[i] for i in alive]

    # Prefill once for each different (prompt, length that RoPE depends on, mixture of overlays).
    prefill_keys = [(r.prompt, _rope_length(config, r), r.mixture) for r in live]
    prompts = {prompt: row for row, prompt in enumerate(dict.fromkeys(prefill_keys))}
    lengths = np.array([len(p) for p, _, _ in prompts], np.int32)
    slots = max(len(r.prompt) + r.max_new_tokens for r in live)
    slots = min(bucket(slots), config.max_length)
    cache, seen, last = _empty(config, model.compute, len(prompts), slots, vocab_size)
    chunk = min(bucket(int(lengths.max())), LARGEST_CHUNK)
    padded = np.zeros((len(prompts), -(-int(lengths.max()) // chunk) * chunk), np.int32)
    for row, (prompt, _, _) in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    # Padding may reach beyond the last slot; JAX drops scattered values that are out of bounds.
    per_row = _per_row(model, prompts)
    for start in range(0, padded.shape[1], chunk):
        tokens = padded[:, start : start + chunk]
        cache, seen, last = _prefill(
            model, cache, seen, last, tokens, np.int32(start), lengths, per_row
        )

    rows = np.array([prompts[prompt] for prompt in prefill_keys])
    if len(rows) != len(prompts):
        cache, seen, last = _take(cache, rows), seen[rows], last[rows]
    per_row = _per_row(model, prefill_keys)
    keys = _keys(*_seeds(live))
    settings = stack([r.sampling for r in live])
    positions = jnp.asarray(lengths[rows])
    token, logprob, seen = _first(model, last, positions, seen, keys, settings)

    left = {row: r.max_new_tokens for row, r in enumerate(live)}
    for step in itertools.count(1):
        if not left:
            return
        current = token, logprob
        if max(left.values()) > 1:
            if grows(config):
                per_row = per_row._replace(turns=turns(config, lengths[rows] + step))
            # Dispatched before the host reads the current token, so that the device never waits.
            cache, seen, token, logprob, positions = _decode(
                model, cache, seen, token, positions, keys, settings, per_row
            )
        ids, logprobs = (np.asarray(x).tolist() for x in current)
        for row in list(left):
            i, token_id = alive[row], ids[row]
            left[row] -= 1
            reason = "stop" if token_id in live[row].stop else None if left[row] else "length"
            events = [] if reason == "stop" else [Event(i, token_id, logprobs[row])]
            events += [Event(i, None, finish_reason=reason)] if reason else []
            for event in events:
                if i not in cancelled:
                    yield event
            if reason or i in cancelled:
                del left[row]


def _rope_length(config, request):
    """The length that RoPE depends on while the prompt is read; 0 if it depends on none."""
    if grows(config):
        return len(request.prompt)
    return len(request.prompt) + request.max_new_tokens if depends_on_length(config) else 0


def _per_row(model, rows):
    """`_PerRow` for rows (prompt, length, mixture)."""
    config = model.config
    row_turns = turns(config, [r[1] for r in rows]) if depends_on_length(config) else None
    mixture = np.array([r[2] for r in rows], np.float32) if model.overlays else None
    return _PerRow(row_turns, mixture)


def _seeds(requests):
    """Three uint32 [B] of which random keys are made: seed, hash of the prompt, number.

    The prompt is among them so that different prompts with one seed get independent draws.
    """
    hashes = [zlib.crc32(np.asarray(r.prompt, np.int64).tobytes()) for r in requests]
    rows = [(r.seed, prompt, r.number) for r, prompt in zip(requests, hashes, strict=True)]
    return np.array(rows, np.uint32).T
