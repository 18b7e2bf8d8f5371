"""train.py as a user meets it: signals, resuming, its summary, and bad input."""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recipes
import yaml

from jllama import cli
from jllama.config import recipe as configs
from jllama.store.find import latest_step
from jllama.train.folder import flatten
from jllama.train.loop import train
from jllama.train.metrics import read

ROOT = Path(__file__).parent.parent
STEPS = 150


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A run of steps enough to be met in the middle, with checkpoints on the way."""
    path = recipes.on_disk(tmp_path_factory.mktemp("text"))
    data = yaml.safe_load(path.read_text())
    data["training"] |= {"steps": STEPS}
    data["checkpoint"] = {"every": 20}
    data["eval"] |= {"every": 0, "compare_xz": True}
    data["sample"] = {"prompt": "def ", "max_new_tokens": 12}
    path.write_text(yaml.safe_dump(data))
    return path


def start(recipe, name, *options):
    command = [sys.executable, "train.py", "--config", str(recipe), f"--run.name={name}", *options]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def until(process, step):
    """Waits until a step is reported; gives the steps reported."""
    seen = []
    for line in process.stderr:
        if match := re.match(r"step (\d+)  loss", line):
            seen.append(int(match[1]))
            if seen[-1] >= step:
                return seen
    pytest.fail(f"ended after steps {seen}")


@pytest.fixture(scope="module")
def whole(recipe):
    """What an uninterrupted run printed, and its folder."""
    process = start(recipe, "whole")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, recipe.parent / "runs" / "whole"


def digest(folder, capsys):
    capsys.readouterr()
    assert cli.main(["fingerprint", str(folder)]) == 0
    return capsys.readouterr().out


@pytest.mark.optimized
def test_killed_stopped_and_resumed_it_ends_where_an_uninterrupted_run_ends(recipe, whole, capsys):
    folder = recipe.parent / "runs" / "stopped"
    process = start(recipe, "stopped")
    until(process, 1)
    while latest_step(folder) is None:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL

    process = start(recipe, "stopped")
    first = until(process, 1)[0]
    assert (first - 1) % 20 == 0 and first > 1  # it went on from a checkpoint
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == os.EX_TEMPFAIL, err
    assert out == ""
    last = err.splitlines()[-1]
    stopped = re.fullmatch(rf"SIGTERM: stopped at step (\d+) of {STEPS}, checkpointed", last)
    assert stopped, err
    assert first <= int(stopped[1]) < STEPS
    assert not (folder / "summary.json").exists()

    process = start(recipe, "stopped")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"resumed at step {stopped[1]} of {STEPS}" in err
    assert out == whole[0]
    assert digest(folder, capsys) == digest(whole[1], capsys)
    ended, wanted = (
        [(line["step"], line["loss"]) for line in read(run / "metrics.jsonl") if "loss" in line]
        for run in (folder, whole[1])
    )
    assert ended == wanted
    assert len(wanted) == STEPS


def test_a_signal_is_heard_during_an_evaluation(recipe, whole, tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("the cat sat on the mat\n" * 200_000)
    source = {"name": "long", "source": {"kind": "text", "files": [str(held_out)]}}
    options = (f"--data.held_out={json.dumps([source])}", "--eval.every=1", "--eval.max_rows=0")
    process = start(recipe, "evaluated", *options)
    until(process, 1)
    time.sleep(1)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == os.EX_TEMPFAIL, err
    assert err.splitlines()[-1] == f"SIGUSR1: stopped at step 1 of {STEPS}, checkpointed"
    folder = recipe.parent / "runs" / "evaluated"
    assert latest_step(folder) == 1
    assert not [line for line in read(folder / "metrics.jsonl") if "eval_loss" in line]


def test_a_signal_before_the_first_step_is_heard_at_once(recipe, whole):
    process = start(recipe, "compiling")
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "compiling the first step" in line:
            process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == os.EX_TEMPFAIL, lines
    assert lines[-1] == "SIGHUP: stopped with nothing to save; start it again\n"
    assert latest_step(recipe.parent / "runs" / "compiling") is None
    again = configs.load(recipe, ["run.name=compiling", "run.stop_after=1"])
    assert train(again).steps == 1


def test_the_summary_and_what_is_printed(whole):
    out, folder = whole
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() == {
        "steps", "tokens", "train_seconds", "tokens_per_second", "eval", "sample",
    }  # fmt: skip
    figures = ["loss", "bits_per_byte", "xz_bits_per_byte", "xz_conditional_bits_per_byte"]
    assert list(summary["eval"]) == figures
    assert all(math.isfinite(value) for value in summary["eval"].values())
    lines = [line for line in read(folder / "metrics.jsonl") if "loss" in line]
    assert summary["steps"] == STEPS
    assert summary["tokens"] == sum(line["weight"] for line in lines)
    seconds = sum(line["seconds"] for line in lines)
    assert summary["train_seconds"] == pytest.approx(seconds, abs=0.01)
    assert summary["tokens_per_second"] > 0
    for name, value in summary["eval"].items():
        assert re.search(rf"^{name} +{value:.4f}$", out, re.MULTILINE)
    assert summary["sample"].startswith("def ")
    assert out.endswith(summary["sample"].removeprefix("def ") + "\n")


@pytest.fixture
def script(capsys):
    """Runs train.py in this process, as its last line does: (status, stdout, stderr)."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*args):
        status = cli.exit_status(module.main, list(args))
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--training.stepz=3"], "training.stepz: unknown key; did you mean steps?"),
        (["--training.steps=many"], "training.steps: "),
        (["--training.steps=0"], "training.steps: "),
        (["--training.accumulate=3"], "accumulate=3 must divide batch_size=8"),
        (["--data.length=4096"], "data.length=4096 is above model.max_length=48"),
        (["--tokenizer.kind=words"], "tokenizer: kind 'words' is unknown"),
        (["--training.steps"], "--training.steps: needs a value"),
        (["steps=3"], "'steps=3'"),
        (["--mesh.fsdp=3"], "does not fill 8 devices"),
        (
            ["--training.batch_size=6"],
            "training.batch_size=6: must be a multiple of 8, the 8 devices",
        ),
        (["--training.accumulate=2"], "multiple of 16, training.accumulate=2 microbatches x the 8"),
        (["--training.batch_size=20"], "(mesh.replica x mesh.fsdp); nearest: 16 or 24"),
        (["--eval.batch_size=3"], "eval.batch_size=3: must be a multiple of 8, the 8 devices"),
        (["--model.vocab_size=100"], "tokenizer.vocab_size=320 does not fit"),
        (["--sample.prompt=<FILL_ME>, <FILL_ME>"], "sample.prompt: <FILL_ME> appears 2 times"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else None,
)
def test_bad_input_is_one_line_and_status_2(recipe, script, args, said):
    status, out, err = script("--config", str(recipe), "--run.name=bad", *args)
    assert (status, out) == (2, "")
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (recipe.parent / "runs" / "bad").exists()


def test_another_config_in_the_folder_is_status_2(recipe, script, whole):
    status, out, err = script("--config", str(recipe), "--run.name=whole", "--run.seed=5")
    assert (status, out) == (2, "")
    assert "run.seed: 0 before, 5 now" in err
    assert err.count("\n") == 1


def test_a_run_that_infills_ends_with_what_it_fills(recipe, script):
    infill = ["--tokenizer.infill=true", "--data.objective.kind=infill", "--training.steps=2"]
    prompt = "--sample.prompt=f(<FILL_ME>) pass"
    status, out, err = script("--config", str(recipe), "--run.name=fills", *infill, prompt)
    assert status == 0, err
    filled = out.split("--- a sample, after 'f(' and before ') pass'\n")[1].removesuffix("\n")
    summary = json.loads((recipe.parent / "runs" / "fills" / "summary.json").read_text())
    assert summary["sample"] == f"f({filled}) pass"


def test_help_lists_every_key(script):
    status, out, err = script("--help")
    assert (status, err) == (0, "")
    shown = {line.split()[0] for line in out.splitlines() if line.startswith("--")}
    for path in (configs.configs_folder() / "train").glob("*.yaml"):
        for key, value in flatten(configs.to_dict(configs.load(path))).items():
            key = re.sub(r"\.\d+\.", ".0.", key)
            if value != []:
                assert f"--{key}" in shown, key
