"""Perplexity against the length of the context, of the same targets behind more or fewer tokens.

A window is `length` tokens of a text; its last `stride` targets are scored. Windows of every length
end at the same places, so that a curve shows the effect of the context alone.

B windows, T their length, S scored targets.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jllama.adapt.lora import Overlay
from jllama.adapt.mixture import Mixture
from jllama.config import (
    LARGEST_FACTOR,
    AdaptiveRopeScaling,
    ComputeConfig,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    NoRopeScaling,
    NtkRopeScaling,
    YarnRopeScaling,
)
from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.generate.llama import Llama
from jllama.model import llama
from jllama.model.cross_entropy import cross_entropy
from jllama.model.rope import Turns, effective_theta, original_length, turns
from jllama.parallel.context import context_placement
from jllama.parallel.sharding import Placement, activated

# Tokens of a batch of windows; a batch has one window if that is longer.
BATCH_TOKENS = 8192
# The windows are taken from the first part of the data that has this many times their number.
SPREAD = 64

# `model.rope` of a recipe, a kind alone, or "model" for the model's own; see `with_rope`.
Rope = str | Mapping[str, Any]


def windows(
    documents: Iterable[np.ndarray], length: int, stride: int, count: int, join: bool = False
) -> list[np.ndarray]:
    """Windows of `length` + 1 tokens, whose last `stride` are the targets; at most `count`.

    A window lies within one document, or with `join` anywhere in their concatenation. No two
    windows share a target. If there are more than `count` (0 is all), evenly spaced windows are
    taken. They are views of the documents, so overlapping windows share memory.

    Raises:
      UserError: no document, or with `join` their concatenation, is as long as a window.
    """

    def fit(tokens: int) -> int:
        return max(0, (tokens - 1 - length) // stride + 1)

    texts, total, tokens, longest = [], 0, 0, 0
    for document in documents:
        longest, tokens = max(longest, len(document)), tokens + len(document)
        if join or fit(len(document)):
            texts.append(document)
        total = fit(tokens) if join else total + fit(len(document))
        if count and total >= count * SPREAD:
            break
    if not total:
        short = f"all documents together have {tokens:,}"
        if not join and fit(tokens):
            short = f"the longest document has {longest:,}: --join cuts windows across documents"
        raise UserError(f"length {length:,} needs a text of {length + 1:,} tokens, and {short}")
    if join:
        texts = [np.concatenate(texts)]
    # The place of the last target of each window.
    ends = [(text, end) for text in texts for end in range(length, len(text), stride)]
    if count and len(ends) > count:
        ends = [ends[i * len(ends) // count] for i in range(count)]
    return [text[end - length : end + 1] for text, end in ends]


def perplexity(
    model: Llama,
    windows: Sequence[np.ndarray],
    length: int,
    stride: int,
    rope: Rope = "model",
    advance: Callable[[int], None] = lambda tokens: None,
    adapter: Mixture = None,
) -> float:
    """Mean perplexity of the last `stride` tokens of windows, each behind the `length` before it.

    Memory grows with the length, not with its square: attention is computed block by block, and
    logits for the scored tokens alone.

    Args:
      windows: B arrays of T+1 ids from `windows`, of which the last `length` + 1 are read; the
        length may be above the model's `max_length`.
      rope: a scaling in place of the model's own; see `with_rope`.
      advance: called with the number of tokens that were read since its last call.
      adapter: the mixture of the model's adapters; see `Llama`.

    Returns:
      exp of the mean negative log-likelihood per token.

    Raises:
      UserError: the windows are too short for the length or the stride; or as `with_rope`.
    """
    if not 1 <= stride <= length < len(windows[0]):
        raise UserError(
            f"length={length}, stride={stride}: the stride must be from 1 to the length, and the"
            f" length below the windows' {len(windows[0])} tokens"
        )
    angles = turns(with_rope(model.config, rope, length), length)
    # RoPE's turns are arrays, so one program serves all scalings of a length, and all models of one
    # shape.
    plain = dataclasses.replace(
        model.config, rope=NoRopeScaling(kind="none"), rope_theta=1e4, max_length=length
    )
    batch = max(1, min(len(windows), BATCH_TOKENS // length))
    total, overlay, placement = 0.0, model.overlay(adapter), context_placement(model.params)
    for start in range(0, len(windows), batch):
        rows = np.stack([row[-length - 1 :] for row in windows[start : start + batch]])
        weights = (np.arange(batch) < len(rows)).astype(np.float32)
        rows = np.pad(rows, ((0, batch - len(rows)), (0, 0)), mode="edge")
        nll = _nll(
            model.params, plain, model.compute, rows, weights, angles, overlay, stride, placement
        )
        total += float(nll)
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
    """The sum over the last `stride` tokens of rows [B,T+1], weighted by row, in nats."""
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


def with_rope(config: ModelConfig, rope: Rope, length: int) -> ModelConfig:
    """The model with another scaling of RoPE, for texts of `length` tokens.

    `rope` is written as `model.rope` of a recipe, or as its kind alone; "model" changes nothing.
    Keys that are left out are filled in from the model and the length:

      original_length  the length that the model was trained for before its own scaling; for
                       `adaptive` the length after its position interpolation
      factor           for linear, yarn and llama3 the least that reaches `length` from
                       original_length, but not less than the model's own factor; for dynamic 2;
                       for adaptive the factor of the model's position interpolation

    `ntk` and `adaptive` apply on top of the position interpolation of a model that has one; the
    other kinds replace the model's scaling.

    Raises UserError for keys or values that a recipe could not have, or a length that no factor
    reaches.
    """
    if rope == "model":
        return config
    given = {"kind": rope} if isinstance(rope, str) else dict(rope)
    kind, where = str(given.get("kind")), f"rope {rope_label(rope)}"
    original = original_length(config)
    interpolation, extended, own_factor = 1.0, original, 1.0
    match config.rope:
        case LinearRopeScaling(factor=interpolation):
            extended = config.max_length
        case AdaptiveRopeScaling(factor=interpolation, original_length=extended):
            pass
        case YarnRopeScaling(factor=own_factor) | Llama3RopeScaling(factor=own_factor):
            pass
    if kind == "adaptive":
        original = extended
    start = given.get("original_length", original)
    start = start if isinstance(start, int) and start > 0 else original  # the config refuses others
    reach = max(interpolation, own_factor, length / start)
    derived = {
        "linear": {"factor": reach},
        "dynamic": {"factor": 2.0, "original_length": original},
        "adaptive": {"factor": interpolation, "original_length": original},
        "yarn": {"factor": reach, "original_length": original},
        "llama3": {"factor": reach, "original_length": original},
    }.get(kind, {})
    keys = derived | given
    if "factor" not in given and keys.get("factor", 1.0) > LARGEST_FACTOR:
        raise UserError(f"{where}: no factor takes {start:,} positions to {length:,}")
    data = recipes.to_dict(config) | {"rope": keys, "max_length": start}
    changed = recipes.validate(ModelConfig, data, where)
    if isinstance(changed.rope, NtkRopeScaling) and interpolation > 1:
        # NTK is another theta, and so works under an interpolation too.
        under = LinearRopeScaling(kind="linear", factor=interpolation)
        return dataclasses.replace(changed, rope=under, rope_theta=effective_theta(changed))
    return changed


def rope_label(rope: Rope) -> str:
    """A scaling in words, such as `ntk alpha=4`."""
    if isinstance(rope, str):
        return rope
    keys = (f"{key}={value}" for key, value in rope.items() if key != "kind")
    return " ".join([str(rope.get("kind", "?")), *keys])
