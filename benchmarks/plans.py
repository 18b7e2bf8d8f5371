"""Writes docs/plans.md: the figures of `jllama plan` for models and slices that people train on.

python -m benchmarks.plans docs/plans.md     # or: make plans
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

_LLAMA2 = "--config configs/train/pretrain-llama2-7b.yaml"
_LLAMA2_70B = "--config configs/train/pretrain-llama2-70b.yaml"
_LLAMA3 = "--config configs/train/pretrain-llama3-8b.yaml"
_405B = f"{_LLAMA3} --model=llama3.1-405b --mesh.tensor=8 --training.batch_size=512"

# (title, arguments of `jllama plan`); an evaluation batch has as many rows as a microbatch.
ROWS = (
    ("Llama 2 7B", f"{_LLAMA2} --topology v5e:4x4 --training.batch_size=16 --eval.batch_size=16"),
    ("Llama 2 7B", f"{_LLAMA2} --topology v4:2x2x4 --training.batch_size=64 --eval.batch_size=64"),
    (
        "Llama 2 13B",
        f"{_LLAMA2} --model=llama2-13b --topology v5e:8x8 --training.batch_size=128"
        " --eval.batch_size=128",
    ),
    ("Llama 2 70B", f"{_LLAMA2_70B} --topology v5p:8x8x8 --eval.batch_size=1024"),
    (
        "Llama 3.1 8B, 131,072 tokens",
        f"{_LLAMA3} --model=llama3.1-8b --topology v5p:4x4x8 --data.length=131072"
        " --mesh.context=16 --training.batch_size=32 --training.accumulate=4 --eval.batch_size=8",
    ),
    (
        "Llama 3.1 405B, 8,192 tokens",
        f"{_405B} --topology v5p:4x4x4 --training.accumulate=64 --eval.batch_size=8",
    ),
    (
        "Llama 3.1 405B, 8,192 tokens",
        f"{_405B} --topology v5p:4x4x8 --training.accumulate=32 --eval.batch_size=16",
    ),
    (
        "Llama 2 7B, two slices",
        f"{_LLAMA2} --topology v5e:4x4 --slices 2 --mesh.replica=2 --training.batch_size=32"
        " --eval.batch_size=32",
    ),
)
_HEAD = (
    "model", "slice", "mesh", "rows", "state", "rest", "total", "eval", "of", "fits",
    "FLOPs per step", "step at least", "bound by", "sent GB", "overlapped", "modelled step",
    "at half the links", "compile",
)  # fmt: skip


def plan(arguments: str) -> dict[str, Any]:
    """The report of one command, also if the step does not fit."""
    command = [sys.executable, "-m", "jllama", "plan", *shlex.split(arguments), "--tries=0"]
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"status {done.returncode}: jllama plan {arguments}")
    return json.loads(done.stdout)


def row(what: str, report: dict[str, Any]) -> str:
    kinds, mesh = report["hbm_bytes_by_kind"], report["mesh"]
    state, total = kinds["parameters"] + kinds["optimizer"], report["hbm_bytes_per_device"]
    sizes = (
        state,
        total - state,
        total,
        report["eval_hbm_bytes_per_device"],
        report["hbm_capacity_bytes"],
    )
    slices = f"{report['slices']} × " if report["slices"] > 1 else ""
    cells = (
        what,
        slices + report["topology"],
        ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1),
        f"{report['rows_per_device']:g}",
        *(f"{n / 2**30:.2f}" for n in sizes),
        "yes" if report["fits"] else "no",
        f"{report['model_flops_per_step']:.3g}",
        f"{report['step_seconds_at_least'][report['bound_by']]:.3g} s",
        report["bound_by"],
        *_program(report["program"]),
        f"{report['compile_seconds']:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def _program(program: dict[str, Any] | None) -> tuple[str, ...]:
    if program is None:
        return ("", "", "", "")
    collectives = program["collectives"]
    sent = sum(c["sent_bytes"] for c in collectives)
    overlapped = sum(c["sent_bytes"] for c in collectives if c["asynchronous"])
    seconds = program["modelled_seconds"]
    return (
        f"{sent / 1e9:.1f}",
        f"{overlapped / sent:.0%}" if sent else "",
        f"{seconds['100%']:.3g} s",
        f"{seconds['50%']:.3g} s",
    )


def page(reports: list[dict[str, Any]]) -> str:
    versions = sorted({f"jax {r['jax']}, {r['compiler']}" for r in reports})
    lines = [
        "# Plans",
        "",
        "This page is for people who choose devices: it lists what published models need on TPU"
        " slices.",
        "",
        f"`make plans` wrote it ({'; '.join(versions)}). No TPU took part: each row compiles the"
        " real train step and evaluation once.",
        "[planning.md](planning.md) says what each figure means.",
        "",
        f"| {' | '.join(_HEAD)} |",
        f"|{'---|' * len(_HEAD)}",
        *(row(what, report) for (what, _), report in zip(ROWS, reports, strict=True)),
        "",
        "`rows` counts the rows of a microbatch on one data-parallel group of devices. `state` is"
        " parameters and",
        "optimizer, `rest` is everything else in the step, and `eval` is what an evaluation needs,"
        " with the state;",
        "sizes are GiB per device. Rematerialisation and dtypes are the recipes' own unless the"
        " command sets them.",
        "`sent` are the bytes that leave a chip in a step, `overlapped` the share of them beside"
        " which other work runs, and the",
        "modelled step adds the compiler's estimates and the time on the links, but not attention's"
        " kernels.",
        "`compile` is the time to compile the step on the machine that wrote this page.",
        "",
        "The commands, in order; each prints the full report:",
        "",
        "```",
        *(f"jllama plan {arguments}" for _, arguments in ROWS),
        "```",
        "",
    ]
    refused = [
        f"- {what} on {report['topology']}, the {program}: {report[key]}"
        for (what, _), report in zip(ROWS, reports, strict=True)
        for program, key in (
            ("step", "compiler_message"),
            ("evaluation", "eval_compiler_message"),
        )
        if key in report
    ]
    if refused:
        lines += ["The compiler's messages where it refuses:", "", *refused, ""]
    return "\n".join(lines)


def main() -> None:
    reports = []
    for number, (what, arguments) in enumerate(ROWS, 1):
        print(f"{number}/{len(ROWS)} {what}", file=sys.stderr, flush=True)
        reports.append(plan(arguments))
        print(json.dumps(reports[-1]), flush=True)
    Path(sys.argv[1]).write_text(page(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
