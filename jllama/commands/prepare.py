"""`jllama prepare`: a recipe's text to tokens on disk, ahead of training."""

import argparse

from jllama import recipe as recipes
from jllama.data.dataset import open_data, open_tokenizer
from jllama.data.prepared import Prepared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="the recipe; keys follow as for train.py"
    )
    parser.set_defaults(overrides=[])  # it takes what is no argument of its own


def run(args: argparse.Namespace) -> None:
    recipe = recipes.from_arguments(["--config", args.config, *args.overrides])
    tokenizer = open_tokenizer(recipe)
    data = open_data(recipe, tokenizer)
    for part, sources in (("train", data.sources), ("held_out", data.held_out)):
        for name, prepared in sources.items():
            print(f"{part:9} {name}: {_line(prepared)}")


def _line(prepared: Prepared) -> str:
    return (
        f"{prepared.documents:,} documents, {prepared.tokens:,} tokens,"
        f" {prepared.bytes:,} bytes ({prepared.bytes / max(prepared.tokens, 1):.2f} per token),"
        f" {prepared.folder}"
    )
