"""`jllama prepare`: tokenises a recipe's text to disk, ahead of training."""

import argparse
import functools
import importlib.util
from collections.abc import Callable

from jllama.config import recipe as recipes
from jllama.data.opening import open_data, open_tokenizer
from jllama.data.prepare import prepare
from jllama.data.split import TokenStream, sources_of
from jllama.errors import UserError, install
from jllama.store.model import architecture_at

_OPTION = "--pipeline."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="the recipe; keys follow as for train.py"
    )
    parser.add_argument(
        "--runner",
        choices=("direct", "dataflow", "flink", "spark"),
        help="prepare with Apache Beam; --pipeline.KEY=VALUE are Beam's options [no Beam]",
    )
    parser.set_defaults(overrides=[])  # further arguments are keys of the recipe


def run(args: argparse.Namespace) -> None:
    options = [word for word in args.overrides if word.startswith(_OPTION)]
    overrides = [word for word in args.overrides if word not in options]
    recipe = recipes.from_arguments(["--config", args.config, *overrides], architecture_at)
    make = _beam(args.runner, options)
    tokenizer = open_tokenizer(recipe)
    if make is not None:
        for side in ("train", "held_out"):
            for source in sources_of(recipe.data, side):
                prepare(source, tokenizer, recipe.data.prepare, make)
    data = open_data(recipe, tokenizer)
    for side, streams in (("train", data.sources), ("held_out", data.held_out)):
        for name, stream in streams.items():
            print(f"{side:9} {name}: {_line(stream)}")


def _beam(runner: str | None, options: list[str]) -> Callable[..., None] | None:
    """The function that prepares a dataset with Beam; None without a runner."""
    if runner is None:
        if options:
            raise UserError(f"{options[0]}: is an option of Beam; give --runner too")
        return None
    pipeline = {}
    for word in options:
        key, equals, value = word.removeprefix(_OPTION).partition("=")
        if not (key and equals):
            raise UserError(f"{word}: write {_OPTION}KEY=VALUE, and KEY=true for a flag")
        pipeline[key] = True if value == "true" else value
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError(f"--runner {runner}: needs Apache Beam; {install('beam')}")
    from jllama.data import beam  # noqa: PLC0415

    return functools.partial(beam.make, runner, pipeline)


def _line(stream: TokenStream) -> str:
    return (
        f"{stream.documents:,} documents, {stream.tokens:,} tokens,"
        f" {stream.bytes:,} bytes ({stream.bytes / max(stream.tokens, 1):.2f} per token),"
        f" {stream.folder}"
    )
