"""Compares the train step on TPU slices with MaxText's, by what one compiler makes of both.

    python -m benchmarks.tpu --peer PYTHON docs/tpu.md     # or: make bench-tpu

No TPU takes part: libtpu compiles both steps for absent chips, with the JAX and the libtpu of
MaxText's environment. `jllama.plan.program` counts the two programs alike. MaxText is compiled as
it is, and with windowed products off, which its documentation leaves to flags of the compiler.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from jllama.chips import GIB
from jllama.plan import hlo
from jllama.plan.counts import counted
from jllama.plan.topology import parse
from jllama.train.compiler import as_text

ROOT = Path(__file__).parent.parent
_SHARES = ("100%", "50%")
_PEERS = ("MaxText", "MaxText, no windows")
_AS_MAXTEXT = "--training.gradient_dtype=bfloat16"
_NO_WINDOWS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "JAX_PLATFORMS": "cpu",
}


class Case(NamedTuple):
    """The same work for both: keys of `jllama plan`, and of MaxText."""

    title: str
    topology: str
    ours: str
    maxtext: str


_LLAMA2 = "--config configs/train/pretrain-llama2-7b.yaml"
_LLAMA2_70B = "--config configs/train/pretrain-llama2-70b.yaml"
_LLAMA3 = "--config configs/train/pretrain-llama3-8b.yaml"
_ROWS = "--training.batch_size={0} --eval.batch_size={0}"
CASES = (
    Case(
        "Llama 2 7B, 4,096 tokens, a row a chip",
        "v5e:4x4",
        f"{_LLAMA2} {_ROWS.format(16)}",
        "compile_topology=v5e-16 model_name=llama2-7b per_device_batch_size=1"
        " max_target_length=4096",
    ),
    Case(
        "Llama 3 8B, 8,192 tokens, a row a chip",
        "v5e:4x4",
        f"{_LLAMA3} {_ROWS.format(16)}",
        "compile_topology=v5e-16 model_name=llama3-8b per_device_batch_size=1"
        " max_target_length=8192",
    ),
    Case(
        "Llama 2 70B, 4,096 tokens, 16 rows for 8 chips",
        "v5p:8x8x8",
        _LLAMA2_70B,
        "compile_topology=v5p-1024 model_name=llama2-70b per_device_batch_size=2"
        " max_target_length=4096 ici_fsdp_parallelism=64 ici_tensor_parallelism=8",
    ),
    Case(
        "Llama 3.1 8B, 131,072 tokens, a row for 16 chips",
        "v5p:4x4x8",
        f"{_LLAMA3} --model=llama3.1-8b --data.length=131072 --mesh.context=16 {_ROWS.format(8)}",
        "compile_topology=v5p-256 model_name=llama3.1-8b per_device_batch_size=0.0625"
        " max_target_length=131072 ici_context_parallelism=16 ici_fsdp_parallelism=8",
    ),
    Case(
        "Llama 3.1 405B, 8,192 tokens, a row for 8 chips",
        "v5p:4x4x8",
        f"{_LLAMA3} --model=llama3.1-405b --mesh.tensor=8 {_ROWS.format(16)}",
        "compile_topology=v5p-256 model_name=llama3.1-405b per_device_batch_size=0.125"
        " max_target_length=8192 ici_fsdp_parallelism=16 ici_tensor_parallelism=8",
    ),
    Case(
        "Llama 2 7B with LoRA of rank 8, 4,096 tokens, a row a chip",
        "v5e:4x4",
        f"{_LLAMA2} {_ROWS.format(16)} --training.init_from=unread"
        " --adapt='{kind: lora, rank: 8, alpha: 16}'",
        "compile_topology=v5e-16 model_name=llama2-7b per_device_batch_size=1"
        " max_target_length=4096 weight_dtype=bfloat16 lora.enable_lora=true lora.lora_rank=8"
        " lora.lora_alpha=16",
    ),
)


class Answer(NamedTuple):
    """Peak bytes of a chip's memory, and `jllama.plan.counts.counted`; or why there are none.

    `flags` are the compiler's options, as LIBTPU_INIT_ARGS takes them.
    """

    peak: int = 0
    step: dict[str, Any] | None = None
    failure: str = ""
    flags: str = ""


def ours(case: Case, python: str, libtpu: str, *more: str) -> Answer:
    command = [python, "-m", "jllama", "plan", "--topology", case.topology]
    command += [*shlex.split(case.ours), *more, "--tries=0", "--json"]
    env = os.environ | {"TPU_LIBRARY_PATH": libtpu}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"status {done.returncode}: {shlex.join(command)}")
    report = json.loads(done.stdout)
    kinds = report["hbm_bytes_by_kind"]
    peak = sum(kinds.values()) - kinds.get("program", 0)
    flags = " ".join(f"--{option}" for option in as_text(report["xla"]).split())
    return Answer(peak, report["program"], report.get("compiler_message", ""), flags)


def maxtext(case: Case, peer: str, flags: str) -> Answer:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.hlo")
        command = [peer, str(ROOT / "benchmarks" / "peer_maxtext.py"), str(program)]
        command += [*case.maxtext.split(), "compile_topology_num_slices=1"]
        command += ["remat_policy=full", "attention=flash"]
        env = os.environ | _TPU | {"LIBTPU_INIT_ARGS": flags}
        env.pop("TPU_LIBRARY_PATH", None)
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return Answer(failure=(lines or ["no message"])[-1][:200])
        text = program.read_text()
    answer = json.loads(done.stdout.splitlines()[-1])
    step = counted(hlo.parse(text), parse(case.topology), answer["places"])
    return Answer(answer["peak_bytes"], step)


def name_of(case: Case) -> str:
    return f"{case.title}, {case.topology}"


def rows(case: Case, answers: dict[str, Answer]) -> list[str]:
    """The table's lines; the last column compares with the faster one of `_PEERS`."""
    peers = [answers[name].step for name in _PEERS if name in answers and answers[name].step]
    best = {
        share: min((p["modelled_seconds"][share] for p in peers), default=0) for share in _SHARES
    }
    lines = []
    for name, answer in answers.items():
        step = answer.step
        if step is None:
            lines.append(f"| {name_of(case)} | {name} | {answer.failure} | | | | | | |")
            continue
        sent = sum(c["sent_bytes"] for c in step["collectives"])
        hidden = sum(c["sent_bytes"] for c in step["collectives"] if c["asynchronous"])
        seconds = step["modelled_seconds"]
        cells = (
            name_of(case),
            name,
            f"{step['estimated_seconds']:.3f}",
            f"{answer.peak / GIB:.2f}",
            f"{sent / 1e9:.1f}",
            f"{hidden / sent:.0%}",
            *(f"{seconds[share]:.3f}" for share in _SHARES),
            " / ".join(f"{seconds[share] / best[share]:.2f}" for share in _SHARES if best[share]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(version: str, table: list[str]) -> str:
    head = (
        "step", "program", "estimated cycles, s", "peak GiB", "sent GB", "overlapped",
        "modelled step, s", "the same, links at 50%, s", "of MaxText's",
    )  # fmt: skip
    return "\n".join(
        [
            "# The step on TPU slices beside MaxText's",
            "",
            "This page is for people who choose between the two: what one compiler makes of the"
            " same training step.",
            "",
            f"`make bench-tpu` wrote it ({version}).",
            "No TPU took part: the same JAX and libtpu compiled both steps for absent chips, and"
            " `jllama.plan.program` counted them",
            "alike. Parameters and optimizer are float32, products bfloat16, and each block is"
            " recomputed (`full`). All figures are",
            "per chip and step.",
            "",
            f"| {' | '.join(head)} |",
            f"|{'---|' * len(head)}",
            *table,
            "",
            "- *estimated cycles*: the compiler's estimate over all instructions that have one;"
            " attention's kernels, most of the",
            "  work at 131,072 tokens, have none.",
            "- *sent*: bytes that leave a chip. *overlapped*: their share in collectives that other"
            " work runs beside.",
            "- *modelled step*: instructions in scheduled order with their estimates, and"
            " collectives at the links' published",
            "  bandwidth, or half of it; see [planning.md](planning.md). It is a model, not a"
            " measurement.",
            "- *of MaxText's*: both modelled steps over those of MaxText's faster setting, with or"
            " without windows.",
            "- *bfloat16 sent*: with `training.gradient_dtype: bfloat16`, the dtype in which"
            " MaxText sends gradients;",
            "  otherwise jllama sends float32.",
            f"- *no windows*: MaxText with `{_NO_WINDOWS}`;",
            "  *our options*: and with the options of the compiler that jllama takes by default"
            " ([sharding.md](sharding.md#on-tpu-slices)).",
            "- *LoRA*: the base is bfloat16; MaxText's adapters are too, because its step cannot be"
            " traced with float32 ones. Its",
            "  `train_compile` attaches no adapters: here they are attached as by its `train_sft`.",
            "",
            "The work, as `jllama plan` and as MaxText's `train_compile` are told it"
            " (`remat_policy=full attention=flash`):",
            "",
            "```",
            *(
                f"jllama plan --topology {c.topology} {c.ours}\ntrain_compile {c.maxtext}"
                for c in CASES
            ),
            "```",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="the Python of MaxText's environment")
    parser.add_argument(
        "--only", type=int, nargs="*", help="numbers of cases, from 1; the page keeps the others"
    )
    parser.add_argument("page", help="the Markdown file to write")
    args = parser.parse_args()
    ask = (
        "import importlib.metadata as m, libtpu, pathlib;"
        "print(pathlib.Path(libtpu.__file__).parent / 'libtpu.so');"
        "print(', '.join(f'{n} {m.version(n)}' for n in ('maxtext', 'jax', 'libtpu')))"
    )
    done = subprocess.run([args.peer, "-c", ask], stdout=subprocess.PIPE, text=True, check=True)
    libtpu, version = done.stdout.splitlines()
    before = Path(args.page).read_text(encoding="utf-8").splitlines() if args.only else []
    table = []
    for number, case in enumerate(CASES, 1):
        if args.only and number not in args.only:
            table += [line for line in before if line.startswith(f"| {name_of(case)} |")]
            continue
        print(f"{number}/{len(CASES)} {case.title}", file=sys.stderr, flush=True)
        answers = {
            "jllama": ours(case, args.peer, libtpu),
            "jllama, bfloat16 sent": ours(case, args.peer, libtpu, _AS_MAXTEXT),
        }
        for name, flags in zip(_PEERS, ("", _NO_WINDOWS), strict=True):
            answers[name] = maxtext(case, args.peer, flags)
        flags = f"{_NO_WINDOWS} {answers['jllama'].flags}"
        answers["MaxText, no windows, our options"] = maxtext(case, args.peer, flags)
        found = rows(case, answers)
        print("\n".join(found), flush=True)
        table += found
    Path(args.page).write_text(page(version, table), encoding="utf-8")


if __name__ == "__main__":
    main()
