"""The command line as a user meets it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jllama import cli
from jllama.config import recipe as recipes
from jllama.errors import StorageError, UserError

ROOT = Path(__file__).parents[1]


def run(*args: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jllama", *args], capture_output=True, text=True, **kwargs
    )


def test_info_in_json(capsys):
    assert cli.main(["info", "llama2-7b", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"] == 6_738_415_616
    assert figures["bytes"] == {"float32": 26_953_662_464, "bfloat16": 13_476_831_232}
    assert figures["kv_cache_bytes_per_token"] == {"float32": 1_048_576, "bfloat16": 524_288}
    assert figures["length"] == 4096
    assert figures["train_flops_per_token"] == 3 * figures["forward_flops_per_token"]


def test_info_for_people(capsys):
    assert cli.main(["info", "llama3.2-1b", "--length", "8192"]) == 0
    out = capsys.readouterr().out
    assert "1,235,814,400" in out
    assert "rows of 8,192 tokens" in out


@pytest.mark.parametrize("args", [[], ["--all"]], ids=["bare", "all"])
def test_info_lists_every_shipped_model(args, capsys):
    assert cli.main(["info", *args]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[1:]} == set(recipes.model_names())
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


def test_info_of_a_yaml_file(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(recipes.to_yaml(recipes.load_model("stories-15m", ["num_layers=1"])))
    assert cli.main(["info", str(file), "--json"]) == 0
    saved = 5 * (4 * 288 * 288 + 3 * 288 * 768 + 2 * 288)
    assert json.loads(capsys.readouterr().out)["parameters"] == 15_191_712 - saved


def test_info_of_a_run_folder_uses_the_length_of_its_rows(tmp_path, capsys):
    recipe = recipes.load(recipes.configs_folder() / "train" / "tiny.yaml", ["data.length=32"])
    (tmp_path / "config.yaml").write_text(recipes.to_yaml(recipe))
    assert cli.main(["info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["length"] == 32


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["info", "llama-8b"], "llama-7b"),
        (["info", "missing.yaml"], "missing.yaml: no such file"),
        (["info", "."], "an empty folder; expected a run"),
        (["info", "llama-7b", "--length", "0"], "--length=0"),
        (["info", "llama-7b", "--all"], "leave out 'llama-7b'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_unknown_commands_and_options_are_status_2():
    for args in (["frobnicate"], ["info", "--frobnicate"], []):
        result = run(*args)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert "--help" in result.stderr


def test_help_names_every_command():
    out = run("--help").stdout
    assert all(
        name in out and summary.split()[0] in out for name, (_, summary) in cli.COMMANDS.items()
    )


@pytest.mark.parametrize("args", [["--help"], ["info", "--help"], ["info", "llama-7b"]])
def test_light_commands_do_not_import_jax(args):
    code = (
        "import sys; from jllama.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name):
    result = run(name, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: jllama {name}")


@pytest.mark.parametrize(
    "words",
    [
        "jllama vocabulary merge",
        "jllama evaluate perplexity --windows=few",
        "sample.py --samples=x",
    ],
)
def test_help_is_where_an_error_says(words):
    def ask(words):
        start = ["-m"] if words.startswith("jllama") else []
        command = [sys.executable, *start, *words.split()]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    error = ask(words)
    assert error.returncode == 2, error.stderr
    named = re.search(r"; see (.* --help)$", error.stderr.rstrip())[1]
    assert named.removesuffix(" --help") == words.partition(" --")[0]
    shown = ask(named)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: "), shown.stderr


def test_a_reader_that_goes_away_is_no_traceback():
    # `info` ends at once, so close the pipe before it can write.
    process = subprocess.Popen(
        [sys.executable, "-m", "jllama", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_exit_statuses(capsys):
    def fail(error):
        raise error

    assert cli.exit_status(fail, UserError("told so")) == 2
    assert capsys.readouterr().err == "error: told so\n"
    assert cli.exit_status(fail, StorageError("away")) == os.EX_IOERR
    assert capsys.readouterr().err == "error: away\n"
    assert cli.exit_status(fail, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):  # a bug shows its traceback
        cli.exit_status(fail, ZeroDivisionError())
