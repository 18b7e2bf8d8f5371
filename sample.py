"""Continues prompts with a trained model: only the generated text goes to stdout.

A newline ends each of several samples on stdout and a line --- separates them on stderr. With
several prompts, a line on stdout says before each continuation which prompt it continues.
"""

import argparse
import os
import signal
import sys

import jllama
from jllama.adapt.mixture import adapter_weights
from jllama.cli import Parser, exit_status
from jllama.files import storage
from jllama.generate.completion import DEFAULT_NEW_TOKENS, GenerationSettings
from jllama.text import infill


def parse(argv: list[str] | None) -> argparse.Namespace:
    default = GenerationSettings()
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
        dest="prompts",
        action="append",
        default=[],
        type=lambda text: ("--prompt", text),
        metavar="TEXT",
        help=f"text to continue [none: the beginning of a text], or {infill.FILL_ME} in it to fill;"
        " several are continued one after the other",
    )
    add(
        "--prompt-file",
        dest="prompts",
        action="append",
        type=lambda file: (f"--prompt-file {file}", storage.read_text(storage.path(file))),
        metavar="FILE",
        help="a file that holds a prompt, taken as it is, with a newline at its end",
    )
    add(
        "--special-tokens",
        action="store_true",
        help="special tokens in prompts, such as <s>, are tokens and not text",
    )
    add("--prefix-file", metavar="FILE", help="infilling: what stands before, instead of --prompt")
    add("--suffix-file", metavar="FILE", help="infilling: what stands after")
    add("--infill-format", choices=("psm", "spm"), help="infilling: prefix or suffix first [psm]")
    add(
        "--max-new-tokens",
        type=int,
        metavar="COUNT",
        help=f"most new tokens [{DEFAULT_NEW_TOKENS}, or what the model has room for]",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; of several, before the first that comes",
    )
    add("--temperature", type=float, default=default.temperature, help="0 is greedy [%(default)s]")
    add(
        "--top-k",
        type=int,
        default=default.top_k,
        help="keep the K likeliest; 0 is off [%(default)s]",
    )
    add("--top-p", type=float, default=default.top_p, help="nucleus; 1 is off [%(default)s]")
    add(
        "--repetition-penalty",
        type=float,
        default=default.repetition_penalty,
        help="above 1 repeats less [%(default)s]",
    )
    add("--num-samples", type=int, default=1, help="how many continuations [1]")
    add("--seed", type=int, default=default.seed, help="equal seeds give equal text [%(default)s]")
    add("--tokenizer", metavar="PATH", help="another than the model's")
    add(
        "--max-length",
        type=int,
        metavar="COUNT",
        help="positions of the model [those of its config]",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation [the model's]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = vars(parse(argv))
    count = args.pop("num_samples")
    if count < 1:
        raise jllama.UserError(f"num_samples={count}: must be at least 1")
    names = ("prompts", "prefix_file", "suffix_file", "infill_format")
    prompts = infill.prompts_from_options(*(args.pop(name) for name in names))
    adapters = adapter_weights(args.pop("adapter"))
    model = jllama.load(
        args.pop("model"),
        dtype=args.pop("dtype"),
        adapter={path: path for path in adapters} or None,
        tokenizer=args.pop("tokenizer"),
        max_length=args.pop("max_length"),
    )
    args["special"] = args.pop("special_tokens")
    args["adapter"] = adapters or None
    for n, prompt in enumerate(prompts, start=1):
        for number in range(count):
            if len(prompts) > 1:
                sample = f", sample {number + 1} of {count}" if count > 1 else ""
                print(f"--- prompt {n} of {len(prompts)}{sample}: {shown(prompt)}", flush=True)
            elif number:
                print("---", file=sys.stderr, flush=True)
            for piece in model.stream(prompt, sample=number, **args):
                print(piece, end="", flush=True)
            if count > 1 or len(prompts) > 1 or sys.stdout.isatty():
                print(flush=True)


def shown(prompt: str | infill.Infill, most: int = 60) -> str:
    """A prompt on one line, at most about `most` characters of it."""
    if isinstance(prompt, infill.Infill):
        prompt = prompt.prefix + infill.FILL_ME + prompt.suffix
    return repr(prompt if len(prompt) <= most else prompt[: most - 3] + "...")


def interrupted(*_) -> None:
    # Not an exception, which a callback from compiled code may swallow; every piece is flushed.
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)
    sys.exit(exit_status(main))
