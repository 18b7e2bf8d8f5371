"""`jllama COMMAND`: one table of commands, each a module that is imported only when it is called.

A command's module has two functions: `add_arguments(parser)` and `run(args)`, which writes results
to stdout, progress to stderr and raises `UserError` for bad input.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jllama.errors import UserError

COMMANDS = {
    # name: (module, what it does)
    "info": ("jllama.commands.info", "parameters, bytes, FLOPs and KV-cache bytes of a model"),
    "plan": ("jllama.commands.plan", "whether a recipe's step fits a slice that is not there"),
    "prepare": ("jllama.commands.prepare", "tokenise a recipe's text ahead of training"),
    "convert": (
        "jllama.commands.convert",
        "a model to Hugging Face's format, GGUF or ours",
    ),
    "sharding": ("jllama.commands.sharding", "where each parameter lies on a mesh, and its bytes"),
    "evaluate": ("jllama.commands.evaluate", "what a model is worth: perplexity, infilling"),
    "vocabulary": (
        "jllama.commands.vocabulary",
        "train, merge and compare tokenizers; grow a model to one",
    ),
    "fingerprint": ("jllama.commands.fingerprint", "one digest of a checkpoint's bits"),
    "plot": ("jllama.commands.plot", "loss, learning rate and throughput of runs as a PNG"),
}


class Parser(argparse.ArgumentParser):
    """Wrong arguments are one line, as every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    return exit_status(_run, sys.argv[1:] if argv is None else list(argv))


def _run(argv: list[str]) -> int | None:
    # The tables of help and usage need no module but the called one: jax takes seconds to import.
    called = next((arg for arg in argv if not arg.startswith("-")), None)
    parser = Parser(prog="jllama", description="The LLaMA family in JAX.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == called:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "overrides"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = rest
    return args.run(args)


def exit_status(run: Callable[..., Any], *args: Any) -> int:
    """Calls a program's body; what a user may meet becomes one line and an exit status.

    What the body returns is its own answer, nothing is 0; 2 is bad input, 74 storage that failed,
    75 (train.py's) a run that a signal stopped before its end, 130 an interrupt, 141 a
    reader of stdout that went away. Where several processes train, `jllama.parallel.distributed`
    ends one that lost another: 3.
    """
    try:
        status = run(*args)
        sys.stdout.flush()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more on its way out: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status or 0
