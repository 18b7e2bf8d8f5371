"""Perplexity against the length of the context: the same targets, behind more or fewer tokens.

A window is `length` tokens of a text; its last `stride` targets are scored. Windows of every length
end at the same places, so that a curve shows the context and nothing else.

B windows, T their length, S scored targets.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jllama.adapt.lora import Overlay
from jllama.config import (
    LARGEST_FACTOR,
    AdaptiveRopeScaling,
    ComputeConfig,
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    NoRopeScaling,
    NtkRopeScaling,
    RopeScaling,
    YarnRopeScaling,
)
from jllama.errors import UserError
from jllama.generate.llama import Llama, Mixture
from jllama.model import llama
from jllama.model.cross_entropy import cross_entropy
from jllama.model.rope import Turns, effective_theta, original_length, turns
from jllama.parallel.context import context_placement
from jllama.parallel.sharding import Placement, activated

# Tokens of a batch of windows, where a single one is not longer.
BATCH_TOKENS = 8192
# Windows are taken from the beginning of the data that has so many times the wanted number.
SPREAD = 64
ROPES = ("model", "none", "pi", "ntk", "dynamic", "adaptive", "yarn")


def windows(
    documents: Iterable[np.ndarray], length: int, stride: int, count: int, join: bool = False
) -> list[np.ndarray]:
    """Windows of `length` + 1 tokens, whose last `stride` are the targets; at most `count`.

    A window lies within one document, or anywhere in all of them put together with `join`; two have
    no target in common. Of more windows than `count` (0 is all), every so many-th is taken. They
    are views of the documents: what they overlap in is in memory once.

    Raises:
      UserError: no document is as long, or all of them together with `join`.
    """

    def fit(tokens: int) -> int:
        return max(0, (tokens - 1 - length) // stride + 1)

    texts, found, tokens, longest = [], 0, 0, 0
    for document in documents:
        longest, tokens = max(longest, len(document)), tokens + len(document)
        if join or fit(len(document)):
            texts.append(document)
        found = fit(tokens) if join else found + fit(len(document))
        if count and found >= count * SPREAD:
            break
    if not found:
        there = f"all documents together have {tokens:,}"
        if not join:
            there = f"the longest document has {longest:,}: --join cuts windows across documents"
        raise UserError(f"length {length:,} needs a text of {length + 1:,} tokens, and {there}")
    if join:
        texts = [np.concatenate(texts)]
    # Where the last target of each window is.
    ends = [(text, end) for text in texts for end in range(length, len(text), stride)]
    if count and len(ends) > count:
        ends = [ends[i * len(ends) // count] for i in range(count)]
    return [text[end - length : end + 1] for text, end in ends]


def perplexity(
    model: Llama,
    windows: Sequence[np.ndarray],
    length: int,
    stride: int,
    rope: str = "model",
    advance: Callable[[int], None] = lambda tokens: None,
    adapter: Mixture = None,
) -> float:
    """Mean perplexity of the last `stride` tokens of windows, each behind the `length` before it.

    Memory grows with the length, not with its square: attention goes block by block, and logits are
    made for the scored tokens alone.

    Args:
      windows: B arrays of T+1 ids, as `windows` makes them, of which the last `length` + 1 are
        read; the length may be above the model's `max_length`.
      rope: a scaling in place of the model's own; see `scaled`.
      advance: is told how many more tokens were read.
      adapter: which of those loaded over the model; see `Llama`.

    Returns:
      exp of the mean negative log-likelihood per token.

    Raises:
      UserError: a length or a stride that the windows do not hold, or no such scaling.
    """
    if not 1 <= stride <= length < len(windows[0]):
        raise UserError(
            f"length={length}, stride={stride}: the stride is from 1 to the length, and the length"
            f" below the windows' {len(windows[0])} tokens"
        )
    angles = turns(scaled(model.config, rope, length), length)
    # Data decide how RoPE turns: one program serves all scalings of a length, and all models of
    # one shape.
    plain = dataclasses.replace(
        model.config, rope=NoRopeScaling(kind="none"), rope_theta=1e4, max_length=length
    )
    batch = max(1, min(len(windows), BATCH_TOKENS // length))
    total, overlay, placement = 0.0, model.overlay(adapter), context_placement(model.params)
    for start in range(0, len(windows), batch):
        some = np.stack([row[-length - 1 :] for row in windows[start : start + batch]])
        weights = (np.arange(batch) < len(some)).astype(np.float32)
        some = np.pad(some, ((0, batch - len(some)), (0, 0)), mode="edge")
        total += float(
            _nll(
                model.params,
                plain,
                model.compute,
                some,
                weights,
                angles,
                overlay,
                stride,
                placement,
            )
        )
        advance(int(weights.sum()) * length)
    return math.exp(min(total / (len(windows) * stride), 700.0))


@functools.partial(jax.jit, static_argnames=("config", "compute", "stride", "placement"))
def _nll(
    params: llama.Params,
    config: ModelConfig,
    compute: ComputeConfig,
    rows: jax.Array,
    weights: jax.Array,
    turns: Turns,
    overlay: Overlay | None,
    stride: int,
    placement: Placement | None,
) -> jax.Array:
    """Sum over the last `stride` tokens of rows [B,T+1], in nats, each row times its weight [B]."""
    tokens, targets = rows[:, :-1], rows[:, -stride:]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    weights = jnp.broadcast_to(weights[:, None], targets.shape)
    head = llama.head_weight(params, config)
    with activated(placement):
        hidden, _ = llama.apply(
            params, config, compute, tokens, positions, turns=turns, lora=overlay
        )
        _, nll = cross_entropy(
            hidden[:, -stride:], head, targets, weights, 0.0, compute.loss_block, config.vocab_size
        )
    return nll


def scaled(config: ModelConfig, rope: str, length: int) -> ModelConfig:
    """The model under a scaling by its short name, for texts of `length` tokens.

    `model` is its own; `none`; `pi` and `pi:FACTOR`; `ntk:ALPHA`; `dynamic` and `dynamic:FACTOR`;
    `adaptive` and `adaptive:COEFFICIENT`; `yarn` and `yarn:FACTOR`. They begin at the length that
    was trained for before the model's own scaling, its `original_length`. A factor that is not
    given is the least that reaches `length` from there, and no less than that of the scaling that
    it replaces; of `dynamic` it is 2. `ntk` and `adaptive` come on top of the position
    interpolation of a model that has one; the others take the place of what it has.

    Raises UserError for another name, a bad number, or heads too narrow for the kind.
    """
    kind, colon, text = rope.partition(":")
    if kind not in ROPES:
        raise UserError(f"rope {rope!r}: no such scaling; choose of {', '.join(ROPES)}")
    number = _number(rope, text) if colon else None
    if colon and kind in ("model", "none"):
        raise UserError(f"rope {rope!r}: takes no number; write {kind}")
    if kind == "ntk" and number is None:
        raise UserError("rope 'ntk': takes its alpha; write ntk:4")
    if kind in ("ntk", "dynamic", "adaptive") and config.head_dim < 4:
        raise UserError(
            f"rope {rope!r}: needs heads of width 4 at least; the model's are {config.head_dim}"
        )
    if kind == "model":
        return config
    original = original_length(config)
    inside, extended = 1.0, original  # position interpolation, and the length that it makes
    least = length / original
    match config.rope:
        case LinearRopeScaling(factor=inside):
            extended = config.max_length
        case AdaptiveRopeScaling(factor=inside, original_length=extended):
            pass
        case YarnRopeScaling(factor=factor) | Llama3RopeScaling(factor=factor):
            least = max(least, factor)
    reach = max(inside, least) if number is None else number
    if reach > LARGEST_FACTOR:
        raise UserError(f"rope {rope!r}: no scaling takes {original:,} positions to {length:,}")
    scaling: RopeScaling
    match kind:
        case "none":
            scaling = NoRopeScaling(kind="none")
        case "pi":
            scaling = LinearRopeScaling(kind="linear", factor=reach)
        case "ntk":
            scaling = NtkRopeScaling(kind="ntk", alpha=number)
        case "dynamic":
            scaling = DynamicRopeScaling(
                kind="dynamic", factor=number or 2.0, original_length=original
            )
        case "adaptive":
            scaling = AdaptiveRopeScaling(
                kind="adaptive", original_length=extended, coefficient=number or 1.0, factor=inside
            )
        case "yarn":
            scaling = YarnRopeScaling(kind="yarn", factor=reach, original_length=original)
    max_length = getattr(scaling, "original_length", original)
    changed = dataclasses.replace(config, rope=scaling, max_length=max_length)
    if kind == "ntk" and inside > 1:  # is another theta, under whatever interpolation there is
        under = LinearRopeScaling(kind="linear", factor=inside)
        return dataclasses.replace(changed, rope=under, rope_theta=effective_theta(changed))
    return changed


def _number(rope: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 1 <= number <= LARGEST_FACTOR:
        raise UserError(f"rope {rope!r}: {text!r} is no number from 1 to {LARGEST_FACTOR:,.0f}")
    return number
