"""`jllama evaluate EVALUATION`: one table of evaluations, each a module as a command's is."""

import argparse
import importlib

EVALUATIONS = {
    # name: (module, what it does)
    "infill": (
        "jllama.commands.evaluate_infill",
        "exact match and edit similarity of single-line infilling",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="evaluation", metavar="EVALUATION", required=True)
    for name, (module, summary) in EVALUATIONS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        implementation = importlib.import_module(module)
        implementation.add_arguments(command)
        command.set_defaults(evaluate=implementation.run)


def run(args: argparse.Namespace) -> None:
    args.evaluate(args)
