"""`jllama evaluate EVALUATION`: the table of evaluations.

Each has a module like that of a command, with `add_arguments(parser)` and `run(args)`.
"""

import argparse

from jllama.commands import infill, perplexity

EVALUATIONS = {
    # name: (module, what it does)
    "perplexity": (perplexity, "perplexity against the length of the context: table, CSV, PNG"),
    "infill": (infill, "exact match and edit similarity of single-line infilling"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="evaluation", metavar="EVALUATION", required=True)
    for name, (module, summary) in EVALUATIONS.items():
        module.add_arguments(
            commands.add_parser(
                name,
                help=summary,
                description=module.__doc__,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )


def run(args: argparse.Namespace) -> None:
    module, _ = EVALUATIONS[args.evaluation]
    module.run(args)
