"""Preparing writes the same bytes in any way, is not repeated, and is trusted only when whole."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import dying
import numpy as np
import pytest
import tensorflow_datasets as tfds

from jllama.config import PrepareConfig
from jllama.data import records, text_files, worker
from jllama.data.prepare import prepare
from jllama.data.prepared import Prepared
from jllama.errors import StorageError, UserError
from jllama.files import storage


def content(folder):
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.name != "identity.json"
    }


def stream(prepared):
    """Returns the documents as lists of ids, in the order of the stream."""
    tokens, starts = prepared.read(0, prepared.tokens)
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(starts))[1:]]


def expected(tokenizer, texts, shards):
    ids = [tokenizer.encode(t, bos=True, eos=True) for t in texts]
    return [document for shard in range(shards) for document in ids[shard::shards]]


@pytest.mark.parametrize("block_tokens", [1, 7, 50, 100_000])
@pytest.mark.parametrize("shards", [1, 3, 100])
def test_every_document_is_there_with_bos_and_eos(
    prepare_texts, tokenizer, shards, block_tokens, texts
):
    prepared = prepare_texts(shards=shards, block_tokens=block_tokens)
    wanted = expected(tokenizer, texts, shards)
    assert stream(prepared) == wanted
    assert prepared.document_ends().tolist() == np.cumsum([len(d) for d in wanted]).tolist()
    assert (prepared.documents, prepared.vocab_size) == (len(texts), tokenizer.vocab_size)
    assert prepared.tokens == sum(map(len, wanted))
    assert prepared.bytes == sum(len(t.encode()) for t in texts)


def test_a_dataset_whose_file_went_away_while_it_was_made_gets_no_marker(
    prepare_texts, tmp_path, monkeypatch
):
    # As another process does that prepares at the same URL: it removes the folder when it starts.
    listing = storage.listing
    gone = "documents.00001.u64"
    rest = lambda f: {n: size for n, size in listing(f).files.items() if n != gone}  # noqa: E731
    monkeypatch.setattr(storage, "listing", lambda f: storage.Listing(rest(f), set()))
    with pytest.raises(UserError, match=rf"{gone}: was removed while .*\(1 such files\); let only"):
        prepare_texts(folder=str(tmp_path), shards=2)
    assert not list(tmp_path.rglob("identity.json"))
    monkeypatch.undo()
    assert prepare_texts(folder=str(tmp_path), shards=2).documents


def test_any_part_of_the_stream_can_be_read(prepare_texts):
    prepared = prepare_texts(block_tokens=7)
    tokens, starts = prepared.read(0, prepared.tokens)
    for start in (*range(9), 20, prepared.tokens - 1):
        for stop in (start, *range(start + 1, prepared.tokens, 67), prepared.tokens):
            part, part_starts = prepared.read(start, stop)
            assert part.tolist() == tokens[start:stop].tolist()
            assert part_starts.tolist() == starts[start:stop].tolist()


def test_one_and_three_processes_write_the_same_bytes(tmp_path, prepare_texts, monkeypatch):
    monkeypatch.setattr("jllama.data.prepare.CHUNK_CHARACTERS", 200)
    one = prepare_texts(folder=str(tmp_path / "one"), workers=1)
    three = prepare_texts(folder=str(tmp_path / "three"), workers=3)
    assert one.folder.name == three.folder.name
    assert content(one.folder) == content(three.folder)
    assert one.digest == three.digest


def test_tfds_reads_it(prepare_texts):
    prepared = prepare_texts()
    rows = tfds.builder_from_directory(str(prepared.folder)).as_data_source("train")
    tokens = np.concatenate([row["tokens"] for row in rows])
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == prepared.read(0, prepared.tokens)[0].tolist()
    assert sum(len(row["starts"]) for row in rows) == prepared.documents


def test_a_second_run_finds_it(prepare_texts, monkeypatch):
    first = prepare_texts()
    monkeypatch.setattr("jllama.data.prepare._make", None)
    assert prepare_texts().identity == first.identity


def test_what_changes_the_bytes_changes_the_folder(prepare_texts, tmp_path):
    folders = {
        prepare_texts(**options).folder for options in ({}, {"shards": 2}, {"block_tokens": 51})
    }
    assert len(folders) == 3
    assert prepare_texts(workers=2, max_skipped=5).folder in folders


def test_the_same_files_under_another_name_are_not_tokenised_again(
    tmp_path, tokenizer, write_jsonl, texts, capfd
):
    config = PrepareConfig(folder=str(tmp_path / "prepared"), workers=1)
    source = write_jsonl(texts)
    first = prepare(source, tokenizer, config)
    again = prepare(dataclasses.replace(source, name="other"), tokenizer, config)
    assert (again.folder, again.name) == (first.folder, "other")
    assert f"{first.folder}: used for the source other" in capfd.readouterr().err
    (first.folder / "identity.json").unlink()  # it is not whole
    assert (
        prepare(dataclasses.replace(source, name="other"), tokenizer, config).folder != first.folder
    )


@pytest.mark.parametrize(
    "name", ["tokens-train.array_record-00001-of-00003", "documents.00001.u64"]
)
def test_broken_bytes_are_an_error_that_names_the_file(prepare_texts, name):
    prepared = prepare_texts()
    expected_stream = stream(prepared)
    path = prepared.folder / name
    data = path.read_bytes()
    at = len(data) // 2
    path.write_bytes(data[:at] + bytes(b ^ 0xFF for b in data[at : at + 20]) + data[at + 20 :])
    damaged = Prepared.open(prepared.folder)
    with pytest.raises(UserError, match=f"{name}: broken: .*; delete {prepared.folder} to") as e:
        damaged.read(0, damaged.tokens)
        damaged.document_ends()
    assert "\n" not in str(e.value)
    assert stream(prepared_again(prepare_texts, e)) == expected_stream


def prepared_again(prepare_texts, error):
    """Prepares anew once the folder is deleted that the error names."""
    shutil.rmtree(re.search(r"; delete (\S+) to prepare the source again", str(error.value))[1])
    return prepare_texts()


def test_a_changed_source_is_an_error_that_names_the_file(prepare_texts, tmp_path, texts):
    prepared = prepare_texts()
    path = tmp_path / "texts.jsonl"
    with pytest.raises(UserError, match=rf"texts\.jsonl: has changed since {prepared.folder}") as e:
        prepare_texts([*texts[:-1], "another"])
    assert "; delete that folder to prepare the source again, or restore the file" in str(e.value)
    assert Prepared.open(prepared.folder) is not None
    prepare_texts()  # restored: the same content with another modification time
    os.utime(path, ns=(1, 1))
    prepare_texts()
    shutil.rmtree(prepared.folder)
    assert prepare_texts([*texts[:-1], "another"]).digest != prepared.digest


def test_content_that_was_compared_once_is_not_hashed_again(
    tmp_path, tokenizer, write_jsonl, texts, monkeypatch, capfd
):
    config = PrepareConfig(folder=str(tmp_path / "prepared"), workers=1)
    source, path = write_jsonl(texts), tmp_path / "texts.jsonl"
    first = prepare(source, tokenizer, config)
    hashed, digest = [], text_files.file_digest
    monkeypatch.setattr(text_files, "file_digest", lambda p: hashed.append(p) or digest(p))
    for when in (1, 2, 1, 2):  # as on two machines with copies of the source
        os.utime(path, ns=(when, when))
        assert prepare(source, tokenizer, config).identity == first.identity
    assert hashed == [path, path]
    assert "comparing 1 source files whose modification times differ" in capfd.readouterr().err
    path.write_text(path.read_text().replace("number", "Number"))
    os.utime(path, ns=(3, 3))
    with pytest.raises(UserError, match="has changed"):
        prepare(source, tokenizer, config)


def test_files_that_come_and_go_are_errors(tmp_path, tokenizer, write_jsonl, texts):
    config = PrepareConfig(folder=str(tmp_path / "prepared"), workers=1)
    first = write_jsonl(texts, "a")
    source = write_jsonl(texts, "all")
    files = tuple(f.replace("all.jsonl", "*.jsonl") for f in source.source.files)
    source = type(first)(name="x", source=type(first.source)(kind="jsonl", files=files))
    prepare(source, tokenizer, config)
    write_jsonl(["new"], "b")
    with pytest.raises(UserError, match=r"b\.jsonl: is new since"):
        prepare(source, tokenizer, config)
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a\.jsonl: is gone since"):
        prepare(source, tokenizer, config)


def test_prepared_tokens_outlive_their_source(
    prepare_texts, tmp_path, tokenizer, write_jsonl, capfd, texts
):
    prepared = prepare_texts()
    source = write_jsonl(texts)
    (tmp_path / "texts.jsonl").unlink()
    config = PrepareConfig(folder=str(prepared.folder.parent), shards=3, block_tokens=50)
    assert prepare(source, tokenizer, config).digest == prepared.digest
    assert "its source is not on this machine" in capfd.readouterr().err


def test_too_many_bad_documents_leave_nothing_to_trust(prepare_texts, tmp_path, capfd, texts):
    with pytest.raises(UserError, match=r"texts\.jsonl:61: empty document"):
        prepare_texts([*texts, "", *texts, ""], max_skipped=0)
    (folder,) = (tmp_path / "prepared").iterdir()
    assert not [p for p in folder.iterdir() if p.name != ".lock"]
    prepared = prepare_texts([*texts, "", *texts, ""], max_skipped=2)
    assert (prepared.documents, prepared.identity["skipped"]) == (2 * len(texts), 2)
    assert "texts.jsonl:61: empty document; skipped (1 of at most 2)" in capfd.readouterr().err
    said = r"2 bad documents were skipped, above .*max_skipped=1; raise it, or mend the source and"
    with pytest.raises(UserError, match=said):
        prepare_texts([*texts, "", *texts, ""], max_skipped=1)
    assert prepare_texts([*texts, "", *texts, ""], max_skipped=2).digest == prepared.digest
    shutil.rmtree(folder)
    assert prepare_texts([*texts, "-", *texts, "-"], max_skipped=1).identity["skipped"] == 0


def test_damage_is_an_error_and_a_cut_marker_is_no_marker(prepare_texts):
    prepared = prepare_texts()
    marker = prepared.folder / "identity.json"
    whole = marker.read_bytes()
    marker.write_bytes(whole[:-9])
    assert Prepared.open(prepared.folder) is None
    assert prepare_texts().digest == prepared.digest
    path = next(prepared.folder.glob("*array_record*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path.name}: missing or cut short") as e:
        prepare_texts()
    assert prepared_again(prepare_texts, e).digest == prepared.digest


KILLED = """
import json, sys
from jllama.config import JsonlSource, PrepareConfig, SourceConfig
from jllama.data.prepare import prepare
from jllama.text.tokenizer import load_tokenizer
if __name__ == "__main__":
    tokenizer, file, folder = sys.argv[1:]
    source = SourceConfig(name="texts", source=JsonlSource(kind="jsonl", files=(file,)))
    options = dict(folder=folder, workers=2, shards=3, block_tokens=50)
    prepare(source, load_tokenizer(tokenizer), PrepareConfig(**options))
"""


def test_a_killed_run_is_done_anew_and_leaves_no_process(prepare_texts, tokenizer, tmp_path, texts):
    many = texts * 2000
    (tmp_path / "killed.py").write_text(KILLED)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in many))
    tokenizer.save(tmp_path)
    folder = tmp_path / "prepared"
    arguments = [tmp_path / "tokenizer.model", tmp_path / "texts.jsonl", folder]
    run = subprocess.Popen(
        [sys.executable, tmp_path / "killed.py", *arguments],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size for p in folder.glob("*/*.*")):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        (half,) = folder.iterdir()
        assert Prepared.open(half) is None
        while _alive(run.pid):
            assert time.monotonic() < deadline, "a tokenising process outlived its parent"
            time.sleep(0.05)
    finally:
        if _alive(run.pid):
            os.killpg(run.pid, signal.SIGKILL)
    (tmp_path / "texts.jsonl").unlink()
    prepared = prepare_texts(texts)
    assert prepared.folder == half
    assert prepared.documents == len(texts)


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_more_shards_than_files_may_be_open_are_lowered_or_allowed(prepare_texts):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/dev/fd"))) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        with pytest.raises(UserError, match=r"raise ulimit -n, or lower data\.prepare\.shards"):
            prepare_texts(shards=most)
        assert prepare_texts(shards=4).documents
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert prepare_texts(shards=most).documents


def test_another_error_of_the_storage_is_called_by_its_name(prepare_texts, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tokens")
    with monkeypatch.context() as patch:
        patch.setattr(records.ShardWriter, "add", _raises(full))
        with pytest.raises(StorageError, match=r"^tokens: not writable: No space left on device$"):
            prepare_texts()
    assert prepare_texts().documents


def _raises(error):
    def call(*_, **__):
        raise error

    return call


def test_files_that_change_while_they_are_read_are_read_again(
    tokenizer, write_jsonl, tmp_path, monkeypatch
):
    source, config = write_jsonl(["one", "two"]), PrepareConfig(str(tmp_path / "p"), workers=1)
    encode = worker.encode_texts

    def meanwhile(*arguments):
        with open(tmp_path / "texts.jsonl", "a") as file:
            file.write('{"text": "three"}\n')
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "encode_texts", meanwhile)
        with pytest.raises(UserError, match=r"its files changed while they were read; run again$"):
            prepare(source, tokenizer, config)
    assert prepare(source, tokenizer, config).documents == 3


def test_a_process_that_dies_is_said_and_fewer_may_do(prepare_texts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(worker, "encode_in_worker", dying.die)
        with pytest.raises(UserError, match=r"one of 2 .* died .*; lower data\.prepare\.workers$"):
            prepare_texts(workers=2)
    assert prepare_texts(workers=1).documents


def test_a_copy_elsewhere_opens_without_the_lock(prepare_texts, tmp_path):
    prepared = prepare_texts()
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in prepared.folder.glob("[!.]*"):
        (copy / path.name).write_bytes(path.read_bytes())
    assert Prepared.open(copy).read(0, 50)[0].tolist() == prepared.read(0, 50)[0].tolist()
