"""`jllama prepare`: a recipe's text to tokens on disk, ahead of training."""

import argparse

from jllama import config
from jllama.data.dataset import open_data, open_tokenizer
from jllama.data.prepared import Prepared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="the recipe, as for train.py"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the recipe to override"
    )


def run(args: argparse.Namespace) -> None:
    recipe = config.load(args.config, args.overrides)
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
