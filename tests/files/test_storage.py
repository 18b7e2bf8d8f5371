"""URLs: the same run from an object store as from a disk, without one rename."""

import contextlib
import errno
import functools
import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import fsspec
import jax
import numpy as np
import object_stores
import pyarrow
import pyarrow.parquet
import pytest
import recipes
import zstandard

import jllama
from jllama import cli
from jllama.config import (
    JsonlSource,
    ParquetSource,
    PrepareConfig,
    SourceConfig,
    TextSource,
    TrainedTokenizer,
)
from jllama.config import recipe as configs
from jllama.data.prepare import prepare
from jllama.data.prepared import Prepared
from jllama.data.source import documents
from jllama.errors import StorageError, UserError
from jllama.files import storage
from jllama.files.mirror import Mirror
from jllama.store import staging
from jllama.store.checkpoint import Checkpoints
from jllama.store.find import complete_steps, find, latest_step
from jllama.store.model import open_model
from jllama.text.tokenizer import load_tokenizer
from jllama.text.vocabulary import train_sentencepiece
from jllama.train.loop import train
from jllama.train.metrics import read

ROOT = Path(__file__).parents[2]
MODULES = {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto")}


def store(scheme):
    missing = [m for m in MODULES[scheme] if importlib.util.find_spec(m) is None]
    if missing:
        pytest.skip(f"{scheme}:// is not tested: {', '.join(missing)} not installed")
    with object_stores.running(scheme) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem(scheme).clear_instance_cache()
        yield f"{scheme}://{object_stores.BUCKET}"
        fsspec.filesystem(scheme).clear_instance_cache()


@pytest.fixture(scope="module")
def gs():
    yield from store("gs")


@pytest.fixture(scope="module")
def s3():
    yield from store("s3")


@pytest.fixture(params=["local", "gs", "s3"])
def folder(request, tmp_path):
    """A folder that is not there yet, on each kind of storage."""
    if request.param == "local":
        root = str(tmp_path)
    else:
        root = f"{request.getfixturevalue(request.param)}/{tmp_path.name}"
    return storage.path(root) / "folder"


# ------------------------------------------------------------------------------ the layer itself


def test_what_is_written_is_read_listed_and_found(folder):
    assert storage.listing(folder).files == {}
    assert not storage.is_folder(folder)
    storage.make_folder(folder)
    storage.write_text(folder / "a.txt", "straße")
    storage.write_bytes(folder / "b.bin", b"\0" * 1000)
    storage.write_bytes(folder / "b.bin", b"\1" * 10)
    assert storage.read_text(folder / "a.txt") == "straße"
    assert storage.read_bytes(folder / "b.bin") == b"\1" * 10
    assert storage.listing(folder).files == {"a.txt": 7, "b.bin": 10}
    assert storage.is_folder(folder)
    assert storage.exists(folder / "a.txt") and not storage.exists(folder / "c")
    assert storage.matches(f"{folder}/*.txt") == [f"{folder}/a.txt"]
    assert storage.matches(f"{folder.parent}/**/b.*") == [f"{folder}/b.bin"]
    assert storage.matches(f"{folder}/a.txt") == [f"{folder}/a.txt"]
    assert storage.matches(f"{folder}/c*") == []


def test_a_change_of_equal_size_is_another_version(folder):
    storage.make_folder(folder)
    seen = set()
    for data in (b"one", b"two", b"six"):
        storage.write_bytes(folder / "file", data)
        seen.add(storage.stat(folder / "file"))
    assert len(seen) == 3
    assert {s.size for s in seen} == {3}


def test_a_missing_file_is_file_not_found(folder):
    for function in (storage.read_bytes, storage.stat, storage.open_read):
        with pytest.raises(storage.NoSuchFile):
            function(folder / "nothing")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_that_does_not_exist_is_one_line(scheme, request):
    request.getfixturevalue(scheme)
    with pytest.raises(UserError, match=rf"{scheme}://no-such-bucket/file: not writable: \w+"):
        storage.write_text(storage.path(f"{scheme}://no-such-bucket/file"), "text")


class HttpError(Exception):
    def __init__(self, code):
        super().__init__("as gcsfs has them")
        self.code = code


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError("denied"), UserError),
        (OSError(errno.EROFS, "Read-only file system"), UserError),
        (OSError("Forbidden: b/x"), UserError),  # gcsfs's 403
        (HttpError(401), UserError),
        (HttpError("400"), UserError),
        (HttpError(503), StorageError),
        (HttpError(429), StorageError),
        (TimeoutError("timed out"), StorageError),
        (ConnectionRefusedError("refused"), StorageError),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
    ],
    ids=repr,
)
def test_what_may_work_later_is_told_from_what_will_not(error, kind):
    with pytest.raises(UserError) as told, storage.writing(storage.path("gs://b/x")):
        raise error
    assert type(told.value) is kind


def test_a_url_without_its_extra_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"gs://b/x: gs:// needs gcsfs; pip install .* -e '\.\[gcs\]'"
    ):
        storage.path("gs://b/x")
    with pytest.raises(UserError, match=r"needs s3fs; pip install .* -e '\.\[s3\]'"):
        storage.path("s3://b/x")
    with pytest.raises(UserError, match="hdfs://b/x: give a local path or a URL"):
        storage.path("hdfs://b/x")
    assert storage.path("~/x") == Path.home() / "x"


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_growing_file_arrives_whole_at_each_copy_and_at_the_end(scheme, request):
    target = storage.path(request.getfixturevalue(scheme)) / "mirror"
    mirror = Mirror(target)
    (mirror.local / "inner").mkdir()
    with open(mirror.local / "inner" / "log", "w") as log:
        log.write("one\n")
        log.flush()
        mirror.sync()
        assert storage.read_text(target / "inner" / "log") == "one\n"
        log.write("two\n")
    mirror.close()
    assert storage.read_text(target / "inner" / "log") == "one\ntwo\n"
    assert not mirror.local.exists()


def test_a_store_that_is_away_costs_no_file(gs, capfd, monkeypatch):
    mirror = Mirror(storage.path(gs) / "away")
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "sync", lambda: Path("/no/such/file").read_text())
        assert not mirror.try_sync()
    assert "not copied: [Errno 2]" in capfd.readouterr().err
    (mirror.local / "log").write_text("text")
    away = storage.path("gs://no-such-bucket/away")
    monkeypatch.setattr(mirror, "_target", away)
    mirror.close()
    said = capfd.readouterr().err
    assert "not copied: gs://no-such-bucket/away/log: not writable" in said
    assert f"the newest files are in {mirror.local}" in said
    assert (mirror.local / "log").read_text() == "text"


def test_a_folder_with_brackets_in_its_name_has_its_steps(s3, tmp_path):
    folder = storage.path(s3) / "runs[1]" / "checkpoints"
    storage.write_text(folder / "3" / "rest" / "x", "text")
    assert complete_steps(folder) == []
    with (
        pytest.raises(UserError, match="checkpoints/3: not complete"),
        staging.fetched(folder, 3, ["rest"]),
    ):
        pass
    storage.write_text(folder / "3" / "commit_success.txt", "1 files")
    assert complete_steps(folder) == [3]
    with staging.fetched(folder, 3, ["rest"]) as local:
        assert (local / "rest" / "x").read_text() == "text"
    assert storage.exists(folder / "3" / "rest" / "x")
    assert not storage.exists(folder / "3")


# -------------------------------------------------------------------------------- sources and data


TEXTS = recipes.texts(60, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentencepiece(TEXTS * 20, TrainedTokenizer(kind="train", vocab_size=305))


def lines():
    return "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_every_kind_of_file_is_read_from_a_url(scheme, request, tmp_path):
    root = storage.path(request.getfixturevalue(scheme)) / "sources"
    storage.write_bytes(root / "a.jsonl", lines())
    storage.write_bytes(root / "b.jsonl.gz", gzip.compress(lines()))
    storage.write_bytes(root / "c.jsonl.zst", zstandard.compress(lines()))
    storage.write_bytes(root / "d.txt", "\f".join(TEXTS).encode())
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "e.parquet")
    storage.copy_file(tmp_path / "e.parquet", root / "e.parquet")
    found = documents(JsonlSource(kind="jsonl", files=(f"{root}/*.jsonl*",)))
    assert [d.text for d in found] == TEXTS * 3
    found = documents(TextSource(kind="text", files=(f"{root}/d.txt",), separator="\f"))
    assert [d.text for d in found] == TEXTS
    found = list(documents(ParquetSource(kind="parquet", files=(f"{root}/*.parquet",))))
    assert [d.text for d in found] == TEXTS
    assert found[0].where == f"{root}/e.parquet: row 1"
    with pytest.raises(UserError, match=f"{scheme}://.*/none.jsonl: no file matches"):
        list(documents(JsonlSource(kind="jsonl", files=(f"{root}/none.jsonl",))))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_dataset_at_a_url_has_the_bytes_of_a_local_one(scheme, request, tokenizer, tmp_path):
    root = storage.path(request.getfixturevalue(scheme)) / "data"
    storage.write_bytes(root / "texts.jsonl", lines())
    source = JsonlSource(kind="jsonl", files=(f"{root}/texts.jsonl",))
    source = SourceConfig(name="texts", source=source)

    def make(folder):
        options = {"folder": str(folder), "workers": 1, "shards": 3, "block_tokens": 50}
        cache = str(tmp_path / "cache") if scheme == "s3" else ""
        return prepare(source, tokenizer, PrepareConfig(**options, cache=cache))

    local, remote = make(tmp_path / "prepared"), make(root / "prepared")
    assert remote.identity == local.identity
    for name in local.identity["files"]:
        assert storage.read_bytes(remote.folder / name) == (local.folder / name).read_bytes(), name
    for start, stop in ((0, local.tokens), (77, 345)):
        ours, theirs = remote.read(start, stop), local.read(start, stop)
        assert [a.tolist() for a in ours] == [a.tolist() for a in theirs]
    assert remote.document_ends().tolist() == local.document_ends().tolist()
    # Whole once its marker is there, and not before; damage is seen.
    marker = storage.read_bytes(remote.folder / "identity.json")
    fs = fsspec.filesystem(scheme)
    fs.rm(f"{remote.folder}/identity.json")
    assert Prepared.open(remote.folder, str(tmp_path / "cache")) is None
    assert make(root / "prepared").digest == local.digest
    fs.rm(f"{remote.folder}/documents.00001.u64")
    storage.write_bytes(remote.folder / "identity.json", marker)
    with pytest.raises(UserError, match=r"documents.00001.u64: missing or cut short"):
        make(root / "prepared")
    # The text behind it changed: the store's own checksum says so.
    storage.write_bytes(root / "texts.jsonl", lines().replace(b"number", b"Number"))
    with pytest.raises(UserError, match=r"texts.jsonl: has changed since"):
        make(tmp_path / "prepared")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_beam_makes_the_same_dataset_at_a_url(scheme, request, tokenizer, tmp_path):
    pytest.importorskip("apache_beam", reason="needs apache-beam, the extra beam")
    from jllama.data import beam  # noqa: PLC0415

    root = storage.path(request.getfixturevalue(scheme)) / "beam"
    for part in range(3):
        storage.write_bytes(root / f"{part}.jsonl", lines())
    source = JsonlSource(kind="jsonl", files=(f"{root}/*.jsonl",))
    source = SourceConfig(name="texts", source=source)
    options = {"workers": 1, "shards": 2, "block_tokens": 50, "cache": str(tmp_path / "cache")}
    local = prepare(source, tokenizer, PrepareConfig(folder=str(tmp_path), **options))
    config = PrepareConfig(folder=str(root), **options)
    remote = prepare(source, tokenizer, config, functools.partial(beam.make, "direct", {}))
    assert remote.identity == local.identity
    for name in local.identity["files"]:
        assert storage.read_bytes(remote.folder / name) == (local.folder / name).read_bytes(), name
    assert set(storage.listing(remote.folder).files) == {"identity.json", *local.identity["files"]}
    assert not storage.is_folder(remote.folder / "beam")


def test_copies_of_a_dataset_are_fetched_once(gs, tokenizer, tmp_path, monkeypatch):
    root = storage.path(gs) / "cached"
    storage.write_bytes(root / "texts.jsonl", lines())
    source = JsonlSource(kind="jsonl", files=(f"{root}/texts.jsonl",))
    source = SourceConfig(name="texts", source=source)
    config = PrepareConfig(folder=str(root), workers=1, shards=2, cache=str(tmp_path / "cache"))
    first = prepare(source, tokenizer, config)
    fetched = []
    monkeypatch.setattr(storage, "copy_file", lambda *pair: fetched.append(pair))
    again = prepare(source, tokenizer, config)
    assert not fetched
    wanted = first.read(0, 90)[0].tolist()
    assert again.read(0, 90)[0].tolist() == wanted
    # A copy that broke is fetched again once it is deleted.
    monkeypatch.undo()
    for copy in (tmp_path / "cache").rglob("tokens-train*"):
        copy.write_bytes(bytes(b ^ 0xFF for b in copy.read_bytes()))
    with pytest.raises(UserError, match=r"; delete (\S+) to fetch it again$") as e:
        prepare(source, tokenizer, config).read(0, 90)
    shutil.rmtree(re.search(r"; delete (\S+) to fetch", str(e.value))[1])
    assert prepare(source, tokenizer, config).read(0, 90)[0].tolist() == wanted


def test_s3_without_a_cache_is_said_before_the_work(s3, tokenizer):
    storage.write_bytes(storage.path(f"{s3}/texts.jsonl"), lines())
    source = JsonlSource(kind="jsonl", files=(f"{s3}/texts.jsonl",))
    source = SourceConfig(name="texts", source=source)
    with pytest.raises(UserError, match=r"name a local folder for copies in data.prepare.cache"):
        prepare(source, tokenizer, PrepareConfig(folder=f"{s3}/uncached"))
    assert not storage.is_folder(storage.path(f"{s3}/uncached"))


# --------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return recipes.on_disk(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def on_disk(recipe):
    """The recipe's run with everything on disk."""
    return train(configs.load(recipe))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_run_at_urls_stops_resumes_and_is_the_run_on_disk(
    scheme, request, recipe, on_disk, capsys, tmp_path
):
    root = request.getfixturevalue(scheme)
    url = storage.path(root)
    for name in ("train", "held_out"):
        storage.copy_file(recipe.parent / f"{name}.txt", url / "text" / f"{name}.txt")
    (tokenizer,) = (recipe.parent / "prepared").glob("tokenizer-*.model")
    load_tokenizer(tokenizer).save(url / "text")
    storage.copy_file(recipe, url / "recipe.yaml")
    overrides = [
        "tokenizer.kind=file",
        f"tokenizer.path={root}/text",
        f"data.train.0.source.files=[{root}/text/train.txt]",
        f"data.held_out.0.source.files=[{root}/text/held_out.txt]",
        f"data.prepare.folder={root}/prepared",
        f"data.prepare.cache={tmp_path / 'cache' if scheme == 's3' else ''}",
        f"run.folder={root}/runs",
        "run.profile=1:2",
    ]
    config = configs.load(f"{root}/recipe.yaml", overrides)
    stopped = train(recipes.replace(config, run={"stop_after": 5}))
    run = url / "runs" / "run"
    assert (stopped.done, latest_step(run)) == (False, 5)
    assert [x["step"] for x in read(run / "metrics.jsonl") if "loss" in x] == [1, 2, 3, 4, 5]
    result = train(config)
    assert (result.done, result.eval) == (True, on_disk.eval)
    assert "resumed at step 5 of 10" in capsys.readouterr().err
    object_stores.asked(scheme)
    assert open_model(find(run)).place == run / "checkpoints" / "10"
    # The run, its config, its steps, the newest one's marker and the tokenizer.
    asked = object_stores.asked(scheme)
    assert len(asked) <= 7, asked
    ours, theirs = (
        [(x["step"], x["loss"]) for x in read(f / "metrics.jsonl") if "loss" in x]
        for f in (run, on_disk.folder)
    )
    assert ours == theirs
    written = fsspec.filesystem(scheme).find(str(run))
    assert sum("/tensorboard/events" in name for name in written) == 2
    assert any(name.endswith(".xplane.pb") for name in written)

    said = []
    for folder in (str(run), str(on_disk.folder)):
        assert cli.main(["fingerprint", folder]) == 0
        assert cli.main(["info", folder]) == 0
        said.append(capsys.readouterr().out.replace(folder, ""))
    assert said[0] == said[1]
    assert cli.main(["plot", str(run), "--out", str(tmp_path / "plot.png")]) == 0
    texts = [
        jllama.load(where).generate("def ", max_new_tokens=8)
        for where in (str(run), f"{run}/checkpoints/10", on_disk.folder)
    ]
    assert texts[0] == texts[1] == texts[2]
    options = ["--prompt", "def ", "--max-new-tokens", "8", "--seed", "0"]
    sampled = [
        subprocess.run(
            [sys.executable, "sample.py", "--model", where, *options],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=300,
        ).stdout
        for where in (f"{run}/checkpoints/10", str(on_disk.folder))
    ]  # fmt: skip
    assert sampled[0] == sampled[1] != ""
    with pytest.raises(UserError, match=rf"{scheme}://.*/nothing: no such folder"):
        jllama.load(f"{root}/nothing")
    # All of a step but its marker, as when the machine goes: it is no step.
    for name in storage.matches(f"{run}/checkpoints/10/**"):
        if not name.endswith("/10/commit_success.txt"):
            copy = storage.path(name.replace("checkpoints/10/", "checkpoints/11/"))
            storage.write_bytes(copy, storage.read_bytes(storage.path(name)))
    assert latest_step(run) == 10
    with pytest.raises(UserError, match="no step 11; there are: 8, 10"):
        jllama.load(f"{run}/checkpoints/11")
    jax.clear_caches()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_an_adapter_at_a_url_is_the_one_on_disk(scheme, request, recipe, on_disk):
    root = request.getfixturevalue(scheme)
    lora = [f"training.init_from={on_disk.folder}", "adapt={kind: lora, rank: 2, alpha: 4}"]
    config = configs.load(recipe, [*lora, f"run.folder={root}/adapters", "training.steps=3"])
    there = str(train(config).folder)
    for target, source in ((f"{root}/as-peft", there), (f"{root}/as-ours", f"{root}/as-peft")):
        assert cli.main(["convert", source, target]) == 0
    tokens = [[1, 5, 9, 20]]
    wanted = np.asarray(jllama.load(there).logits(tokens))
    assert (wanted != np.asarray(jllama.load(on_disk.folder).logits(tokens))).any()
    for folder in ("as-peft", "as-ours"):
        got = jllama.load(on_disk.folder, adapter=f"{root}/{folder}").logits(tokens)
        np.testing.assert_array_equal(got, wanted)
    jax.clear_caches()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_store_that_goes_away_in_mid_training_is_a_status_to_try_again(
    scheme, recipe, capsys, monkeypatch
):
    async def at_once(*_):
        pass

    for module in MODULES[scheme]:
        pytest.importorskip(module)
    if scheme == "gs":  # the clients' own patience, half a minute a request
        retry = sys.modules["gcsfs"].retry
        monkeypatch.setattr(retry, "asyncio", types.SimpleNamespace(sleep=at_once))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    began = []
    with contextlib.ExitStack() as stack:
        # Only the server ends with the stack: another test's may be running.
        server = stack.enter_context(object_stores.running(scheme))
        for name, value in server.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem(scheme).clear_instance_cache()
        root = f"{scheme}://{object_stores.BUCKET}"

        def save(self, step, save=Checkpoints.save, **trees):
            if not began:
                stack.pop_all().close()
            began.append(step)
            save(self, step, **trees)

        monkeypatch.setattr(Checkpoints, "save", save)
        config = configs.load(recipe, [f"run.folder={root}/runs", "eval.every=0"])
        assert cli.exit_status(train, config) == os.EX_IOERR
    fsspec.filesystem(scheme).clear_instance_cache()
    assert began[0] == 4
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"error: {root}/runs/run/checkpoints")
