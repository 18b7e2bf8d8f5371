"""`jllama evaluate infill`: exact match and edit similarity of single lines."""

import argparse
import json

import jllama
from jllama.errors import UserError
from jllama.evaluate.infill import WAYS, evaluate, open_problems
from jllama.files import outputs, storage
from jllama.generate.llama import adapter_weights
from jllama.progress import say

_MEANING = {
    "psm": "infilled, prefix first",
    "spm": "infilled, suffix first",
    "prefix": "after the prefix alone",
    "line": "commonest line of the context",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="a run or a model's folder")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="PATH[=WEIGHT]",
        help="over the model: a LoRA run or a folder of PEFT's; several add up, each by its weight",
    )
    add(
        "--data",
        required=True,
        help="stdlib: the library's held-out files; a glob of files; or JSON lines as HumanEval's",
    )
    add("--count", type=int, default=500, help="lines, chosen by hash [%(default)s]")
    add("--spans", action="store_true", help="a span of each line is wanted, not the whole of it")
    add("--ways", default=",".join(WAYS), help="answers to compare [%(default)s]")
    add("--length", type=int, help="tokens of prompt and answer [the model's max_length]")
    add("--max-new-tokens", type=int, default=48, help="of an answer [%(default)s]")
    add("--batch-size", type=int, default=16, help="answers generated at a time [%(default)s]")
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation [the model's]")
    add("--out", metavar="FILE", help="JSON lines: each problem and its answers")
    add("--json", action="store_true", help="figures for programs")


def run(args: argparse.Namespace) -> None:
    ways = args.ways.split(",")
    for way in ways:
        if way not in WAYS:
            raise UserError(f"--ways: {way!r} is unknown; of {', '.join(WAYS)}")
    if args.count < 1 or args.batch_size < 1:
        raise UserError("--count and --batch-size: at least 1")
    if args.out:
        outputs.check_absent(storage.path(args.out))
    adapters = adapter_weights(args.adapter)
    problems = open_problems(args.data, args.count, args.spans)
    given = {path: path for path in adapters} or None
    model = jllama.load(args.model, dtype=args.dtype, adapter=given)
    if model.tokenizer is None:
        raise UserError(f"{args.model}: has no tokenizer; put its files there")
    length = model.config.max_length if args.length is None else args.length
    scores = {}
    for way in ways:
        say(f"{way}: {len(problems)} lines")
        scores[way] = evaluate(
            model,
            problems,
            way,
            length=length,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            spans=args.spans,
            adapter=adapters or None,
        )
    if args.out:
        lines = [
            {"where": p.where, "middle": p.middle} | {w: s.answers[i] for w, s in scores.items()}
            for i, p in enumerate(problems)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        storage.write_text(storage.path(args.out), text)
    if args.json:
        figures = {w: {"exact": s.exact, "similarity": s.similarity} for w, s in scores.items()}
        asked = {"model": args.model, "adapters": adapters, "lines": len(problems)}
        print(json.dumps(asked | {"length": length} | figures))
        return
    wanted = "spans" if args.spans else "lines"
    print(f"{'answer':32}  exact match  edit similarity   ({len(problems)} {wanted})")
    for way, score in scores.items():
        name = f"{way}: {_MEANING[way]}"
        print(f"{name:40}{100 * score.exact:6.1f}%  {100 * score.similarity:14.1f}%")
