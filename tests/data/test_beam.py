"""Preparing with Apache Beam writes the same bytes as in processes, with any workers."""

import functools
import gzip
import json

import pytest

from jllama import cli
from jllama.config import JsonlSource, PrepareConfig, SourceConfig
from jllama.data.prepare import prepare
from jllama.errors import UserError

pytest.importorskip("apache_beam", reason="needs apache-beam, the extra beam")

from jllama.data import beam


@pytest.fixture
def source(tmp_path, texts):
    """Files of different lengths: one is compressed, one is empty, and two have a bad line."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i, (start, stop) in enumerate(((0, 7), (7, 8), (8, 8), (8, 31), (31, len(texts)))):
        lines = [json.dumps({"text": t}) for t in texts[start:stop]]
        if i in (1, 3):
            lines.insert(1, "{")
        data = "".join(line + "\n" for line in lines).encode()
        suffix = ".gz" if i == 3 else ""
        (folder / f"{i}.jsonl{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return SourceConfig(
        name="texts", source=JsonlSource(kind="jsonl", files=(f"{folder}/*.jsonl*",))
    )


@pytest.fixture
def make(source, tokenizer, tmp_path, monkeypatch):
    """Prepares the source in a folder of the given name, with a task per file."""
    monkeypatch.setattr(beam, "_TASK_BYTES", 1)

    def make(name, options=None, shards=3, **changes):
        folder = str(tmp_path / name)
        kwargs = {"shards": shards, "block_tokens": 50, "workers": 1, "max_skipped": 2} | changes
        how = None if options is None else functools.partial(beam.make, "direct", options)
        return prepare(source, tokenizer, PrepareConfig(folder=folder, **kwargs), how)

    return make


def content(prepared):
    return {
        p.name: p.read_bytes()
        for p in prepared.folder.rglob("*")
        if p.is_file() and p.name[0] != "."
    }


@pytest.mark.parametrize("shards", [1, 3, 100])
def test_one_worker_writes_the_bytes_of_the_in_process_path(make, shards, texts):
    wanted, made = make("in-process", shards=shards), make("beam", {}, shards=shards)
    assert made.documents == len(texts)
    assert made.folder.name == wanted.folder.name
    assert content(made) == content(wanted)  # including identity.json


@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_three_workers_write_the_same_bytes(make, mode):
    options = {"direct_num_workers": "3", "direct_running_mode": mode}
    assert content(make("beam", options)) == content(make("in-process"))


def test_bad_documents_are_reported_and_refused_as_in_process(make, capfd, tmp_path):
    reports, errors = [], []
    for name, options in (("in-process", None), ("beam", {})):
        capfd.readouterr()
        make(name, options)
        reports.append([line for line in capfd.readouterr().err.splitlines() if "skipped" in line])
        with pytest.raises(UserError) as error:
            make(f"{name}-strict", options, max_skipped=1)
        errors.append(str(error.value))
    assert reports[0] == reports[1]
    assert len(reports[0]) == 2
    assert errors[0] == errors[1]
    assert "3.jsonl.gz:2: malformed JSON" in errors[0]
    (folder,) = (tmp_path / "beam-strict").iterdir()
    assert not (folder / "identity.json").exists()
    assert not (folder / "beam").exists()


def test_a_broken_file_is_the_same_line(make, tmp_path):
    path = tmp_path / "text" / "3.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-12])
    errors = []
    for name, options in (("in-process", None), ("beam", {})):
        with pytest.raises(UserError) as error:
            make(name, options)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert "compressed data ends early" in errors[0]


def test_the_command_prepares_a_recipe(tmp_path, capsys):
    import recipes  # noqa: PLC0415

    command = ["prepare", "--config", str(recipes.on_disk(tmp_path))]
    assert cli.main(command) == 0
    wanted = capsys.readouterr().out
    other = f"--data.prepare.folder={tmp_path / 'other'}"
    given = ["--runner", "direct", "--pipeline.direct_num_workers=1"]
    assert cli.main([*command, other, *given]) == 0
    assert capsys.readouterr().out == wanted.replace("prepared/", "other/")
    assert cli.main([*command, "--pipeline.region=x"]) == 2
    assert "--pipeline.region=x: is an option of Beam; give --runner too" in capsys.readouterr().err
    assert cli.main([*command, *given[:2], "--pipeline.streaming"]) == 2
    said = "--pipeline.streaming: write --pipeline.KEY=VALUE, and KEY=true for a flag"
    assert said in capsys.readouterr().err
    assert cli.main([*command, *given[:2], "--pipeline.streaming=true"]) == 0  # prepared already
    capsys.readouterr()
    assert cli.main([*command, f"{other}2", "--runner", "dataflow"]) == 2
    assert "Dataflow's workers share no disk" in capsys.readouterr().err
