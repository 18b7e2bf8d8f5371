"""Fills in single lines of files, and measures exact match and edit similarity."""

import argparse
import json

import jllama
from jllama.adapt.mixture import adapter_weights
from jllama.commands.table import table
from jllama.errors import UserError
from jllama.evaluate.infill import WAYS, evaluate, open_problems
from jllama.files import outputs, storage
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
        help="over the model: a LoRA run or a folder of PEFT's; several add up by their weights",
    )
    add(
        "--data",
        required=True,
        help="stdlib: the library's held-out files; a glob of files; or JSON lines as HumanEval's",
    )
    add("--count", type=int, default=500, help="number of lines, chosen by hash [%(default)s]")
    add("--spans", action="store_true", help="fill in a span of each line, not the whole line")
    add("--ways", default=",".join(WAYS), help="ways of answering to compare [%(default)s]")
    add("--length", type=int, help="tokens of prompt and answer [the model's max_length]")
    add("--max-new-tokens", type=int, default=48, help="tokens of an answer [%(default)s]")
    add("--batch-size", type=int, default=16, help="answers generated at a time [%(default)s]")
    add("--tokenizer", metavar="PATH", help="another than the model's")
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of the computation [the model's]")
    add("--out", metavar="FILE", help="write each problem and its answers there, as JSON lines")
    add("--json", action="store_true", help="print exact figures as JSON")


def run(args: argparse.Namespace) -> None:
    ways = args.ways.split(",")
    for way in ways:
        if way not in WAYS:
            raise UserError(f"--ways: {way!r} is unknown; choose from {', '.join(WAYS)}")
    if args.count < 1 or args.batch_size < 1:
        raise UserError("--count and --batch-size: must be at least 1")
    if args.out:
        outputs.check_absent(storage.path(args.out))
    adapters = adapter_weights(args.adapter)
    problems = open_problems(args.data, args.count, args.spans)
    given = {path: path for path in adapters} or None
    model = jllama.load(args.model, dtype=args.dtype, adapter=given, tokenizer=args.tokenizer)
    if model.tokenizer is None:
        raise UserError(f"{args.model}: has no tokenizer; give one: --tokenizer PATH")
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
        settings = {"model": args.model, "adapters": adapters, "lines": len(problems)}
        print(json.dumps(settings | {"length": length} | figures))
        return
    answers = f"answers to {len(problems)} {'spans' if args.spans else 'lines'}"
    rows = [(answers, "exact match", "edit similarity")]
    for way, score in scores.items():
        rows.append((f"{way}: {_MEANING[way]}", f"{score.exact:.1%}", f"{score.similarity:.1%}"))
    print(table(rows))
