"""Trains a recipe: python train.py --config configs/train/tiny.yaml --training.steps=100

Any key of the recipe can be overridden: --section.key=value. The same command resumes a run that
was interrupted; one that a signal stops before its end exits with status 75: start it again.
"""

import json
import os
import sys

import jllama
from jllama.cli import exit_status
from jllama.config import Config, recipe
from jllama.evaluate.compress import xz_bits_per_byte
from jllama.files import storage
from jllama.parallel import distributed
from jllama.store.model import architecture_at
from jllama.text.infill import FILL_ME, Infill, parse_prompt
from jllama.train.loop import train
from jllama.train.report import Result


def main(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(f"{__doc__}\n{recipe.help_text()}")
        return os.EX_OK
    config = recipe.from_arguments(argv, architecture_at)
    prompt = parse_prompt("sample.prompt", config.sample.prompt)
    result = train(config)
    if result.done and not result.stopped and distributed.leader():
        report(config, result, prompt)
    return os.EX_TEMPFAIL if result.stopped else os.EX_OK


def report(config: Config, result: Result, prompt: str | Infill) -> None:
    """Writes summary.json, and prints the held-out loss and the sample."""
    summary = {
        "steps": result.steps,
        "tokens": result.tokens,
        "train_seconds": round(result.seconds, 2),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "eval": dict(result.eval or {}),
        "sample": None,
    }

    def save() -> None:
        storage.write_text(result.folder / "summary.json", json.dumps(summary, indent=1) + "\n")

    save()  # compressing and sampling may fail
    if result.eval and config.eval.compare_xz:
        summary["eval"] |= xz_bits_per_byte(config.data)
        save()
    for key, value in summary["eval"].items():
        print(f"{key:30} {value:.4f}")
    if config.sample.max_new_tokens:
        wanted = recipe.to_dict(config.sample)
        before, _, after = wanted.pop("prompt").partition(FILL_ME)
        print(f"--- a sample, after {before!r}" + (f" and before {after!r}" if after else ""))
        model, pieces = jllama.load(result.folder), []
        for piece in model.stream(prompt, seed=config.run.seed, **wanted):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
        summary["sample"] = before + "".join(pieces) + after
        save()


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
