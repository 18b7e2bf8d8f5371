"""Compares the train step with transformers in PyTorch; prints a table on stdout.

    python -m benchmarks.compare --peers "$(python tests/peers/environment.py transformers)"

The machine may be shared and its speed may drift. So every round runs each program once, and the
figures are medians over the rounds, also of the ratios within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
# (model, rows, tokens per row): the second is 768 wide and 12 layers deep.
CPU_SETTINGS = [("stories-15m", 16, 256), ("stories-110m", 4, 256)]


def programs(peers: str, model: str, batch: int, length: int, args) -> dict[str, list[str]]:
    """The command of each program, by its name."""
    size = ["--batch", str(batch), "--length", str(length), "--steps", str(args.steps)]
    path = ["--model", str(ROOT / "configs" / "model" / f"{model}.yaml"), "--dtype", args.dtype]
    peer = [peers, str(ROOT / "benchmarks" / "peer_transformers.py"), *path, *size]
    extra = [word for item in args.set for word in ("--set", item)]
    ours = [sys.executable, "-m", "benchmarks.train_step", *path, *size, "--json", *extra]
    return {
        "jllama": ours,
        "transformers, torch.compile": [*peer, *args.peer_option],
        "transformers, eager": [*peer, *args.peer_option, "--eager"],
    }


def measure(command: list[str]) -> dict:
    """Runs a program and returns the JSON object that it prints."""
    # All programs get glibc's huge pages, because allocation is part of a step on a CPU.
    env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    run = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed with status {run.returncode}")
    return json.loads(run.stdout.splitlines()[-1])


def table(results: dict[str, list[dict]]) -> str:
    """A Markdown table of medians over the rounds; a ratio compares times of the same round."""
    ours = results["jllama"]
    lines = [
        "| | seconds per step | of them the fastest | seconds over jllama's | peak memory, GiB |",
        "|---|---|---|---|---|",
    ]
    for name, rounds in results.items():
        times = [r["seconds_per_step"] for r in rounds]
        ratio = statistics.median(
            t / o["seconds_per_step"] for t, o in zip(times, ours, strict=True)
        )
        memory = statistics.median(r["peak_memory_bytes"] for r in rounds) / 2**30
        least = min(r["seconds_per_step_min"] for r in rounds)
        lines.append(
            f"| {name} | {statistics.median(times):.3f} | {least:.3f} | {ratio:.2f} |"
            f" {memory:.2f} |"
        )
    fraction = statistics.median(r["fraction_of_peak"] for r in ours)
    peak = statistics.median(r["matmul_peak_gflops_per_second"] for r in ours)
    lines += ["", f"jllama: {fraction:.0%} of a matrix-product peak of {peak:,.0f} GFLOP/s."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", required=True, help="python with torch and transformers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps per run")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--setting", action="append", metavar="MODEL:BATCH:LENGTH", help="instead of the CPU ones"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="jllama's")
    parser.add_argument("--peer-option", action="append", default=[], help="the peer's")
    args = parser.parse_args()
    settings = CPU_SETTINGS
    if args.setting:
        settings = [(m, int(b), int(t)) for m, b, t in (s.split(":") for s in args.setting)]
    for model, batch, length in settings:
        commands = programs(args.peers, model, batch, length, args)
        results = {name: [] for name in commands}
        bar = tqdm(total=args.rounds * len(commands), desc=model, disable=None)
        for _ in range(args.rounds):
            for name, command in commands.items():
                results[name].append(measure(command))
                bar.update()
        bar.close()
        peer = results["transformers, torch.compile"][0]
        print(f"### {model}: {batch} rows of {length} tokens, {args.dtype}\n")
        print(table(results))
        print(f"\ntorch {peer['torch']}, transformers {peer['transformers']}, {peer['device']}.\n")


if __name__ == "__main__":
    main()
