"""`jllama prepare`: tokens on disk ahead of training, once."""

import re

import recipes

from jllama import cli


def files(folder):
    """What is there, and when it was written."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if "lock" not in p.name}


def test_a_second_time_does_nothing_and_says_the_same(tmp_path, capsys):
    command = ["prepare", "--config", str(recipes.on_disk(tmp_path))]
    assert cli.main(command) == 0
    first = capsys.readouterr()
    train, held_out = first.out.splitlines()
    assert train.startswith("train     train: 200 documents, ")
    size = sum(len(text.encode()) for text in recipes.texts(12, seed=2))
    assert held_out.startswith("held_out  held_out: 12 documents, ")
    assert f" {size:,} bytes " in held_out
    made = files(tmp_path / "prepared")
    assert cli.main(command) == 0
    assert capsys.readouterr().out == first.out
    assert files(tmp_path / "prepared") == made
    # Another length of rows is not another preparation.
    assert cli.main([*command, "--data.length=32"]) == 0
    assert files(tmp_path / "prepared") == made


def test_a_held_out_share_has_a_line_of_its_own(tmp_path, capsys):
    recipe = str(recipes.on_disk(tmp_path))
    share = "--data.held_out={from: train, one_in: 5}"
    assert cli.main(["prepare", "--config", recipe, share]) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = [re.fullmatch(r"(\w+) +train: (\d+) documents, .*", line).groups() for line in lines]
    assert [side for side, _ in counts] == ["train", "held_out"]
    assert sum(int(count) for _, count in counts) == 200


def test_bad_input_is_one_line(tmp_path, capsys):
    recipe = str(recipes.on_disk(tmp_path))
    assert cli.main(["prepare", "--config", recipe, "--data.lenght=32"]) == 2
    assert "data.lenght: unknown key; did you mean length?" in capsys.readouterr().err
    (tmp_path / "train.txt").unlink()
    assert cli.main(["prepare", "--config", recipe]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ")
    assert "train.txt" in err
