"""`jllama vocabulary grow`: gives a model a row for every id of a larger tokenizer."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp

from jllama import flops
from jllama.adapt import vocab
from jllama.commands.convert import host_places, read_on_host
from jllama.errors import UserError
from jllama.files import outputs, storage
from jllama.progress import say
from jllama.store.find import find
from jllama.store.model import open_model
from jllama.store.write import write_model
from jllama.text.merge import spell_new_ids
from jllama.text.tokenizer import load_tokenizer


def grow(args: argparse.Namespace) -> None:
    """Runs the command in host memory; `jllama.commands.vocabulary` defines its arguments."""
    jax.config.update("jax_platforms", "cpu")
    for name, given in (("MODEL", args.source), ("DST", args.target)):
        if not given:
            raise UserError(f"{name} is empty; name a folder")
    if args.multiple < 1:
        raise UserError(f"--multiple {args.multiple}: must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: must be from 0 to 2^32 - 1")
    target = storage.path(args.target)
    outputs.check_absent(target)
    tokenizer = load_tokenizer(args.tokenizer)
    stored = open_model(find(storage.path(args.source), args.source_format), args.model)
    if stored.tokenizer is None:
        base, spelt = _unchecked(args, stored.config.vocab_size, tokenizer.vocab_size)
    else:
        base = stored.tokenizer.vocab_size
        if base > stored.config.vocab_size:
            raise UserError(
                f"{args.source}: the tokenizer has {base:,} ids and the embedding"
                f" {stored.config.vocab_size:,} rows: it is another model's, or adds tokens that"
                " the model was not made for; grow a copy of the folder without the tokenizer's"
                " files"
            )
        try:
            spelt = spell_new_ids(stored.tokenizer, tokenizer)
        except UserError as e:
            raise UserError(f"{args.tokenizer}: {e}") from None
    config = dataclasses.replace(
        stored.config, vocab_size=tokenizer.vocab_size, vocab_multiple=args.multiple
    )
    dtype, scale_dtype = (
        "float32" if kind == "float16" else kind for kind in (stored.dtype, stored.scale_dtype)
    )
    count = flops.parameter_count(config)
    size = (count + flops.padding_count(config)) * jnp.dtype(dtype).itemsize
    outputs.check_room(target, size)
    with outputs.stoppable(target):
        places = host_places(config, dtype, scale_dtype)
        params = read_on_host(stored, dtype, scale_dtype)
        params = vocab.grow_tables(params, places, base, spelt, args.rows, args.seed)
        write_model(target, config, params, tokenizer)
    padding = config.vocab_rows - config.vocab_size
    print(
        f"{target}: {config.vocab_size:,} ids: {base:,} of {args.source} and {len(spelt):,} new"
        f" ({args.rows})"
        + f", {padding:,} rows of padding" * bool(padding)
        + f"; {count:,} parameters"
    )


def _unchecked(args: argparse.Namespace, base: int, ids: int) -> tuple[int, list[list[int]]]:
    """The rows of a model without a tokenizer, and an empty spelling for each new id."""
    if args.rows == "pieces":
        raise UserError(
            f"{args.source}: has no tokenizer to spell new pieces with; put its tokenizer.model"
            " there, in place of a tokenizer.json, or give --rows mean"
        )
    if ids < base:
        raise UserError(
            f"{args.tokenizer}: has {ids:,} ids, and the model {base:,} rows: a vocabulary can grow"
            " and not shrink"
        )
    say(f"note: {args.source} has no tokenizer: whether its ids are kept cannot be checked")
    return base, [[] for _ in range(ids - base)]
