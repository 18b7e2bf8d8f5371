"""The loss of held-out text."""

import math
from collections.abc import Callable
from typing import Any

import jax

from jllama.config import Config, ReplyObjective
from jllama.data.dataset import eval_batches
from jllama.data.opening import Data
from jllama.data.pack import CutRows
from jllama.parallel.sharding import Placement
from jllama.train.step import EvalStep


class Left(Exception):
    """The evaluation was left before its end, because a process was asked to stop."""


def evaluate(
    config: Config,
    data: Data,
    placement: Placement,
    eval_step: EvalStep,
    trainable: Any,
    frozen: Any = (),
    *,
    max_rows: int = 0,
    stride: int = 0,
    vote: Callable[[], jax.Array | bool] = lambda: False,
) -> dict[str, float] | None:
    """Returns the loss over all held-out sources, the same in every process; all call it.

    Args:
      eval_step: what `make_eval_step` returns.
      trainable, frozen: the arguments of the loss function.
      max_rows: how many rows of each source are read; 0 reads all of them.
      stride: rows that are cut from a stream begin this many tokens apart, and only the last
        `stride` targets of each are scored. 0 is the row's length.
      vote: asked once a batch whether to leave the evaluation; the answer is the same in every
        process, and may still be computed.

    Returns:
      "loss", nats per predicted token, and "bits_per_byte" of UTF-8 text; None when nothing is
      held out. Under the objective `reply` there are no bits per byte: only replies are predicted,
      and the bytes of their prompts are not known apart.

    Raises `Left` after a batch at which `vote` said so.
    """
    size = config.eval.batch_size
    total_nll = total_weight = total_bits = total_bytes = 0.0
    for name, prepared in data.held_out.items():
        rows = data.held_out_rows[name]
        if 0 < stride < config.data.length and isinstance(rows, CutRows):
            rows = CutRows(prepared, config.data.length, stride=stride)
        part = placement.batch_rows(size, "eval.batch_size")
        nll = weight = 0.0
        for batch in eval_batches(rows, config.data.length, size, max_rows, part):
            batch = placement.put_batch(batch, size)
            leave = vote()
            sums = jax.device_get(eval_step(trainable, frozen, batch))
            if leave:
                raise Left
            nll, weight = nll + float(sums[0]), weight + float(sums[1])
        if not weight:
            continue
        total_nll, total_weight = total_nll + nll, total_weight + weight
        # Every token but each document's BOS is predicted. Where only the first rows are read, the
        # rest of the source is taken to have the same loss.
        predicted = prepared.tokens - prepared.documents
        total_bits += nll / weight / math.log(2) * predicted
        total_bytes += prepared.bytes
    if not total_weight:
        return None
    values = {"loss": total_nll / total_weight}
    if not isinstance(config.data.objective, ReplyObjective):
        values["bits_per_byte"] = total_bits / total_bytes
    return values
