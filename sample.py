"""Continues a prompt with a trained model: only the generated text goes to stdout.

A newline ends each of several samples on stdout and a line --- separates them on stderr.
"""

import argparse
import os
import signal
import sys

import jllama
from jllama.adapt.mixture import adapter_weights
from jllama.cli import Parser, exit_status
from jllama.config import SampleConfig
from jllama.text import infill


def parse(argv: list[str] | None) -> argparse.Namespace:
    default = SampleConfig()
    parser = Parser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="PATH",
        help="a run, RUN/checkpoints/STEP, or a model's folder",
    )
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[=WEIGHT]",
        help="over the model: a LoRA run or a folder of PEFT's; several add up, each by its weight",
    )
    add(
        "--prompt",
        default="",
        help=f"text to continue [none: the beginning of a text], or {infill.FILL_ME} in it to fill",
    )
    add("--prefix-file", metavar="FILE", help="infilling: what stands before, instead of --prompt")
    add("--suffix-file", metavar="FILE", help="infilling: what stands after")
    add("--infill-format", choices=("psm", "spm"), help="infilling: prefix or suffix first [psm]")
    add("--max-new-tokens", type=int, help="most new tokens [256, or what the model has room for]")
    add("--temperature", type=float, default=default.temperature, help="0 is greedy [%(default)s]")
    add("--top-k", type=int, default=default.top_k, help="keep the K likeliest; 0 is off [0]")
    add("--top-p", type=float, default=default.top_p, help="nucleus; 1 is off [%(default)s]")
    add("--repetition-penalty", type=float, default=1.0, help="above 1 repeats less [1]")
    add("--num-samples", type=int, default=1, help="how many continuations [1]")
    add("--seed", type=int, default=0, help="equal seeds give equal text [0]")
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation [the model's]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = vars(parse(argv))
    count = args.pop("num_samples")
    if count < 1:
        raise jllama.UserError(f"num_samples={count}: must be at least 1")
    names = ("prompt", "prefix_file", "suffix_file", "infill_format")
    prompt = infill.prompt_from_options(*(args.pop(name) for name in names))
    adapters = adapter_weights(args.pop("adapter"))
    model = jllama.load(
        args.pop("model"),
        dtype=args.pop("dtype"),
        adapter={path: path for path in adapters} or None,
    )
    args["adapter"] = adapters or None
    for number in range(count):
        if number:
            print("---", file=sys.stderr, flush=True)
        for piece in model.stream(prompt, sample=number, **args):
            print(piece, end="", flush=True)
        if count > 1 or sys.stdout.isatty():
            print(flush=True)


def interrupted(*_) -> None:
    # Not an exception, which a callback from compiled code may swallow; every piece is flushed.
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)
    sys.exit(exit_status(main))
