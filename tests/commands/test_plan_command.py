"""`jllama plan` as a user meets it; what needs the TPU compiler skips where it is missing."""

import json
import os
import re
import subprocess
import sys

import pytest
import recipes

from jllama import cli
from jllama.commands import plan
from jllama.config import recipe as recipe_loader
from jllama.errors import UserError
from jllama.flops import train_flops_per_token
from jllama.plan.process import CompileFailed, find_libtpu

ROWS, LENGTH = 8, 256


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe whose sizes a TPU takes as they are."""
    folder = tmp_path_factory.mktemp("plan")
    sizes = {"hidden_dim": 128, "num_heads": 2, "head_dim": 64, "ffn_dim": 384, "max_length": 256}
    path = recipes.on_disk(folder, vocab_size=512, num_layers=12, **sizes)
    overrides = [f"data.length={LENGTH}", "compute.dtype=bfloat16", f"training.batch_size={ROWS}"]
    # With more memory for a fusion the compiler takes two to three times as long.
    overrides.append("compute.xla.tpu.xla_tpu_scoped_vmem_limit_kib=null")
    path.write_text(recipe_loader.to_yaml(recipe_loader.load(path, overrides)))
    return str(path)


@pytest.fixture
def compiler():
    try:
        find_libtpu()
    except UserError as e:
        pytest.skip(str(e))


def run(capsys, *args):
    """The exit status, stdout and stderr of a plan for four chips."""
    status = cli.main(["plan", "--topology", "v5e:2x2", *args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def compilations(err):
    """How many there were; a long one says again that it is going on."""
    return sum("compiling" in line and "until now" not in line for line in err.splitlines())


def test_a_step_that_fits(recipe, compiler, capsys):
    before = dict(os.environ)
    status, out, err = run(capsys, "--config", recipe, "--json", "--mesh.tensor=2")
    figures, config = json.loads(out), recipe_loader.load(recipe)
    assert status == 0 and figures["fits"] is True
    assert (figures["devices"], figures["mesh"]["fsdp"], figures["mesh"]["tensor"]) == (4, 2, 2)
    slowest = max(figures["step_seconds_at_least"].values())
    assert figures["run_seconds_at_least"] == config.training.steps * slowest
    assert figures["model_flops_per_step"] == round(
        ROWS * LENGTH * train_flops_per_token(config.model, LENGTH)
    )
    # Of each block a quarter of the matrices and all of the norms; of both tables a quarter.
    block = (4 * 128 * 128 + 3 * 128 * 384) // 4 + 2 * 128
    parameters = 4 * (12 * block + 2 * 512 * 128 // 4 + 128)
    kinds = figures["hbm_bytes_by_kind"]
    assert kinds["parameters"] == parameters
    counts = kinds["optimizer"] - 2 * parameters  # both moments, and a few scalars
    assert 0 < counts < 64
    assert kinds["batch"] == 3 * 4 * (ROWS // 2) * (LENGTH + 1)
    assert figures["hbm_bytes_per_device"] == sum(kinds.values())
    assert kinds["temporaries"] > 0
    assert figures["hbm_capacity_bytes"] == round(15.75 * 2**30)
    state = parameters + kinds["optimizer"]
    assert figures["eval_fits"] is True
    assert state < figures["eval_hbm_bytes_per_device"] < figures["hbm_bytes_per_device"]
    assert figures["xla"]["xla_enable_async_all_reduce"] is True
    assert "xla_tpu_scoped_vmem_limit_kib" not in figures["xla"], "the recipe takes it away"
    program = figures["program"]
    sent = sum(c["sent_bytes"] for c in program["collectives"])
    # The bound is never below what the program sends: v5e's four links carry 200 GB/s.
    assert figures["step_seconds_at_least"]["interconnect"] == pytest.approx(sent / 200e9, rel=1e-3)
    kinds = {c["kind"] for c in program["collectives"]}
    assert {"all-gather", "reduce-scatter"} <= kinds
    full, half = (program["modelled_seconds"][share] for share in ("100%", "50%"))
    assert program["estimated_seconds"] < full < half
    assert program["uncounted_loops"] == 0
    waits = sum(program["exposed_seconds"]["100%"].values())
    assert full == pytest.approx(program["estimated_seconds"] + waits)
    assert (
        figures["compile_seconds"] > 0 and figures["bound_by"] in figures["step_seconds_at_least"]
    )
    assert err.count("\n") == 1, "the library's own noise is not shown"
    assert dict(os.environ) == before


def test_a_step_that_does_not_fit_says_what_would(recipe, compiler, capsys):
    too_many = ["--training.batch_size=32768", "--compute.remat=full"]
    status, out, err = run(capsys, "--config", recipe, *too_many, "--tries=1")
    assert status == 1
    assert "exceeds available HBM (15.75G)" in out
    line = next(x for x in out.splitlines() if "--training.accumulate=8192" in x)
    assert line.split()[:3] == ["batch", "--training.accumulate=8192", "fits"]
    assert compilations(err) == 2


def test_an_evaluation_that_the_compiler_refuses_beside_a_step_that_fits(recipe, compiler, capsys):
    shallow = ["--model.num_layers=1", "--compute.attention.kind=reference"]
    rows = "--eval.batch_size=262144"
    status, out, _ = run(capsys, "--config", recipe, "--json", "--tries=0", *shallow, rows)
    figures = json.loads(out)
    assert (status, figures["fits"], figures["eval_fits"]) == (1, False, False)
    assert figures["hbm_bytes_per_device"] < figures["hbm_capacity_bytes"]
    assert "compiler_message" not in figures
    assert figures["eval_hbm_bytes_per_device"] > figures["hbm_capacity_bytes"]
    assert "exceeds available HBM (15.75G)" in figures["eval_compiler_message"]


def pretend(monkeypatch, compile_step):
    """Makes `compile_step` the compiler, installed or not."""
    monkeypatch.setattr(plan, "compile_step", compile_step)
    monkeypatch.setattr(plan, "environment", lambda _: {})


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--training.batch_size=6"], "training.batch_size=6: must be a multiple of 4"),
        (["--eval.batch_size=6"], "eval.batch_size=6: must be a multiple of 4"),
        (["--mesh.fsdp=3"], "mesh: replica=1, fsdp=3, context=1, tensor=1 does not fill 4 devices"),
        (["--mesh.tensor=3"], "mesh.tensor=3: 4 devices do not divide by it; they do by 2 or 4"),
        (["--slices=2"], "mesh.replica=1: the 8 devices are 2 slices"),
        (["--mesh.tensor=4"], "layers.attention.o.kernel: axis 'heads'"),
        (
            ["--mesh.context=4", "--data.length=18"],
            "data.length=18 does not divide by mesh.context",
        ),
        (["--training.batch_size=8"], "planning needs the TPU compiler"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_anything_is_compiled(
    recipe, args, said, monkeypatch, capsys
):
    def missing(_):
        raise UserError("planning needs the TPU compiler")

    monkeypatch.setattr(plan, "compile_step", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(plan, "environment", missing)
    status, out, err = run(capsys, "--config", recipe, *args)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {said}") and err.count("\n") == 1


def test_what_is_known_without_compiling_starts_no_device(recipe):
    code = "import sys; from jllama.cli import main; sys.exit(main(sys.argv[1:]))"
    heads = ["--topology", "v5e:2x2", "--mesh.tensor=4"]
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "--config", recipe, *heads],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "nowhere"},
    )
    assert (done.returncode, "axis 'heads'" in done.stderr) == (2, True), done.stderr


def test_what_is_no_lack_of_memory_is_reported_as_itself(recipe, monkeypatch, capsys):
    def fail(*_):
        raise CompileFailed("INTERNAL: Mosaic failed to compile TPU kernel")

    pretend(monkeypatch, fail)
    status, out, err = run(capsys, "--config", recipe)
    assert (status, out) == (3, "")
    last = err.splitlines()[-1]
    assert last == "error: the compiler failed: INTERNAL: Mosaic failed to compile TPU kernel"


def report(fits):
    size = 2**30
    return {
        "topology": "v5e:2x2", "slices": 1, "devices": 4, "device_kind": "TPU v5 lite",
        "mesh": {"replica": 1, "fsdp": 4, "context": 1, "tensor": 1}, "rows_per_device": 2.0,
        "tokens_per_step": 1, "fits": fits, "hbm_capacity_bytes": size,
        "hbm_bytes_per_device": size // 2 if fits else 2 * size,
        "hbm_bytes_by_kind": {"parameters": 1, "optimizer": 2, "temporaries": size},
        "eval_hbm_bytes_per_device": size // 4, "eval_fits": True,
        "host_bytes_per_device": 0, "model_flops_per_step": 10**12, "compile_seconds": 1.0,
        "step_seconds_at_least": {"compute": 2.0, "hbm": 1.0}, "bound_by": "compute",
        "run_seconds_at_least": 4 * 86400, "recipe": "a.yaml",
        "program": PROGRAM, "xla": {"a": True},
    }  # fmt: skip


GATHER = {
    "kind": "all-gather", "dtype": "bf16", "asynchronous": True, "arrays": 12, "bytes": 4 * 10**9,
    "sent_bytes": 3 * 10**9,
}  # fmt: skip
PROGRAM = {
    "collectives": [GATHER], "estimated_cycles": 10, "unestimated": 1200,
    "estimated_seconds": 1.0,
    "modelled_seconds": {"100%": 1.25, "50%": 1.5},
    "exposed_seconds": {"100%": {"all-gather, asynchronous": 0.25}, "50%": {"all-reduce": 0.5}},
}  # fmt: skip


def test_two_plans_stand_side_by_side_with_their_ratios(tmp_path, capsys):
    scatter = GATHER | {"kind": "reduce-scatter", "asynchronous": False}
    second = report(False) | {
        "program": PROGRAM | {"collectives": [scatter], "unestimated": 0},
        "topology": "v6e:2x2",
    }
    gpu = report(True) | {"program": {"collectives": []}}
    files = []
    for name, figures in (("a", report(True)), ("b", second), ("gpu", gpu)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(figures))
    assert cli.main(["plan", "--compare", str(files[0]), str(files[1])]) == 0
    rows = {re.split("  +", line)[0]: re.split("  +", line)[1:] for line in lines_of(capsys)}
    assert rows["topology"] == ["v5e:2x2", "v6e:2x2"]
    assert rows["fits"] == ["yes", "no"]
    assert rows["memory per device"] == ["0.50 GiB", "2.00 GiB", "4.000"]
    assert rows["fusions that have no estimate"] == ["1,200", "-"]
    assert rows["modelled step, links at 50%"] == ["1.5 s", "1.5 s", "1.000"]
    assert rows["sends by all-gather, bf16, overlapped"] == ["3 GB", "0 GB"]
    assert rows["sends by reduce-scatter, bf16, waited for"] == ["0 GB", "3 GB"]
    assert cli.main(["plan", "--compare", str(files[0]), str(files[2])]) == 0
    assert any(re.match("modelled step, links at 50% +1.5 s +-", line) for line in lines_of(capsys))


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not readable as JSON"),
        ("{}", "is no report that `jllama plan --json` printed"),
        ("[]", "expected a JSON object"),
        (None, "plan.json"),
    ],
)
def test_what_is_no_plan_cannot_be_compared(tmp_path, capsys, text, said):
    file = tmp_path / "plan.json"
    if text is not None:
        file.write_text(text)
    assert cli.main(["plan", "--compare", str(file), str(file)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("given,missing", [("--config=x", "topology"), ("--topology=x", "config")])
def test_a_plan_needs_a_recipe_and_a_slice(capsys, given, missing):
    assert cli.main(["plan", given]) == 2
    assert (
        capsys.readouterr().err == f"error: --{missing}: is required, unless --compare is given\n"
    )


def test_json_of_a_search_has_what_was_tried(recipe, monkeypatch, capsys):
    def compile_step(config, *_):
        return report(config.compute.remat == "full")

    pretend(monkeypatch, compile_step)
    status, out, _ = run(capsys, "--config", recipe, "--json", "--training.batch_size=4")
    figures = json.loads(out)
    assert status == 1 and figures["fits"] is False
    (full,) = [t for t in figures["tried"] if t["fits"]]
    assert full["kind"] == "remat" and full["change"] == ["compute.remat=full"]
    assert full["hbm_bytes_per_device"] == 2**29
    assert all(t["step_seconds_at_least"] > 0 for t in figures["tried"])


def test_an_evaluation_that_does_not_fit_is_named_and_gets_fewer_rows(recipe, monkeypatch, capsys):
    def compile_step(config, *_):
        fits = config.eval.batch_size == 4  # a row per device
        size = {"eval_hbm_bytes_per_device": 0.4 * 2**30 if fits else 2**31}
        return report(True) | {"fits": fits, "eval_fits": fits} | size

    pretend(monkeypatch, compile_step)
    status, out, _ = run(capsys, "--config", recipe)
    assert status == 1
    lines = out.splitlines()
    at = lines.index("  the step fits: 0.50 GiB of 1.00 GiB")
    hint = "; lower eval.batch_size, down to 4"
    assert lines[at + 1] == f"  the evaluation does not fit: 2.00 GiB of 1.00 GiB{hint}"
    words = " ".join(lines[-1].split())
    assert re.fullmatch(
        r"eval --eval\.batch_size=4 fits at least \S+ s 0\.50 GiB, evaluation 0\.40 GiB", words
    )


def test_what_the_compiler_leaves_out_of_an_evaluation_is_said(recipe, monkeypatch, capsys):
    refused = {
        "fits": False, "eval_fits": False, "eval_hbm_bytes_per_device": 3 * 2**30,
        "eval_compiler_message": "(2.50G) exceeds available HBM (1.00G).",
        "hbm_bytes_by_kind": {"parameters": 1, "optimizer": 2**29},
    }  # fmt: skip
    pretend(monkeypatch, lambda *_: report(True) | refused)
    _, out, _ = run(capsys, "--config", recipe, "--eval.batch_size=4", "--tries=0")
    assert "  the evaluation does not fit: 3.00 GiB of 1.00 GiB\n" in out, "a row on each device"
    (line,) = [line for line in out.splitlines() if "(2.50G) exceeds" in line]
    assert "optimizer's 0.50 GiB" in line


def test_a_state_above_the_capacity_has_the_devices_that_it_takes(recipe, monkeypatch, capsys):
    config = recipe_loader.load(recipe)
    block = 4 * 128 * 128 + 3 * 128 * 384 + 2 * 128
    whole = 3 * 4 * (12 * block + 2 * 512 * 128 + 128)  # parameters and both moments, float32
    capacity = whole // 6 + 100  # more than a sixth, the fifth and last of the devices not full
    assert config.model.num_layers == 12
    small = {
        "hbm_capacity_bytes": capacity, "eval_fits": False,
        "hbm_bytes_by_kind": {"parameters": capacity, "optimizer": capacity},
    }  # fmt: skip
    pretend(monkeypatch, lambda *_: report(False) | small)
    status, out, err = run(capsys, "--config", recipe, "--json", "--compute.remat=full")
    figures = json.loads(out)
    assert status == 1
    assert whole < figures["state_bytes"] < whole + 64
    assert figures["state_devices_at_least"] == 6
    assert compilations(err) == 1 + sum(not t["failure"] for t in figures["tried"])
    _, out, _ = run(capsys, "--config", recipe, "--compute.remat=full")
    assert "  parameters and optimizer alone are " in out and " take 6 of them at least\n" in out
    assert "iB: parameters and optimizer alone, not compiled" in out
    assert "the evaluation does not fit" in out and "lower" not in out, "fewer rows do not help"


def test_the_page_is_aligned(recipe, monkeypatch, capsys):
    pretend(monkeypatch, lambda *_: report(True))
    status, out, _ = run(capsys, "--config", recipe)
    lines = out.splitlines()[1:]
    assert status == 0
    assert lines[-6].endswith("  4.0 days")
    shown = [tuple(re.split("  +", line.strip())) for line in lines[-5:]]
    assert shown == [
        ("sends by all-gather, bf16, overlapped", "3 GB in 12 arrays"),
        ("compiler's estimate of its work", "1 s, without 1,200 fusions that have none"),
        ("modelled step, links at 100%", "1.25 s, of which it waits 0.25 s"),
        ("modelled step, links at 50%", "1.5 s, of which it waits 0.5 s"),
        ("XLA: a", "true"),
    ]
    column = {len(x) - len(x[2:].split("  ", 1)[1].lstrip()) for x in lines}
    assert len(column) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--topology", "v5e-15"], "or give the sides, v5e:AxB"),
        (["--enough=0"], "--enough=0"),
        (["--tries=-1"], "--tries=-1"),
        (["--slices=0"], "--slices=0"),
        (["--nonsense.key=1"], "nonsense"),
    ],
)
def test_bad_input_is_one_line(recipe, args, said, capsys):
    status, out, err = run(capsys, "--config", recipe, *args)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err
