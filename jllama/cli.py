"""`jllama COMMAND`: the table of commands; a command's module is imported only when it is called.

The module has two functions: `add_arguments(parser)`, and `run(args)`, which writes results to
stdout, progress to stderr, and raises `UserError` for bad input.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jllama.errors import Stopped, UserError
from jllama.platforms import explain

COMMANDS = {
    # name: (module, what it does)
    "info": ("jllama.commands.info", "parameters, bytes, FLOPs and KV-cache bytes of a model"),
    "plan": ("jllama.commands.plan", "whether a recipe's step fits a slice of TPUs, or GPUs"),
    "prepare": ("jllama.commands.prepare", "tokenise a recipe's text ahead of training"),
    "convert": (
        "jllama.commands.convert",
        "convert a model to Hugging Face's format, GGUF or ours",
    ),
    "sharding": ("jllama.commands.sharding", "how parameters are sharded on a mesh, and bytes"),
    "evaluate": ("jllama.commands.evaluate", "measure a model: perplexity, infilling"),
    "vocabulary": (
        "jllama.commands.vocabulary",
        "train, merge and compare tokenizers; grow a model to one",
    ),
    "fingerprint": ("jllama.commands.fingerprint", "a digest of a checkpoint's bits"),
    "compare": ("jllama.commands.compare", "what differs between runs, and their losses"),
    "plot": ("jllama.commands.plot", "draw loss, learning rate and throughput of runs as a PNG"),
}


class Parser(argparse.ArgumentParser):
    """Raises `UserError` for wrong arguments, so that they are one line as all bad input is."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    return exit_status(_run, sys.argv[1:] if argv is None else list(argv))


def _run(argv: list[str]) -> int | None:
    # Help and usage need no module but that of the called command: jax takes seconds to import.
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
    """Runs a program's body and returns its exit status; expected errors become one line.

    The status is what the body returns, or 0 for None. It is 2 for bad input, 74 for storage that
    failed, 75 for a training run that a signal stopped before its end, 130 for an interrupt, and
    141 if the reader of stdout went away. A training process that lost another one exits with 3
    (`jllama.parallel.distributed`).
    """
    try:
        status = run(*args)
        sys.stdout.flush()
    except UserError as e:
        return _say(e)
    except (AssertionError, RuntimeError) as e:
        if (line := explain(e)) is None:
            raise
        return _say(UserError(line))
    except Stopped as e:
        print(e, file=sys.stderr)
        return e.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout again at exit: send that to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status or 0


def _say(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.status
