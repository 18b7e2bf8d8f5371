"""Reading documents from every kind of source, whole and broken."""

import bz2
import codecs
import gzip
import json
import lzma
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from jllama.config import JsonlSource, ParquetSource, StdlibSource, TextSource, TfdsSource
from jllama.data import json_array, text_files
from jllama.data.source import Document, documents, source_files
from jllama.data.worker import is_held_out, text_hash
from jllama.errors import UserError


def read(source, **kwargs):
    return [d.text for d in documents(source, **kwargs)]


def text_source(*files, separator=None):
    return TextSource(kind="text", files=tuple(map(str, files)), separator=separator)


def jsonl_source(*files, **kwargs):
    return JsonlSource(kind="jsonl", files=tuple(map(str, files)), **kwargs)


PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def packed(suffix, data):
    return PACKERS[suffix](data)


def test_the_library_is_split_by_file():
    parts = {
        split: list(documents(StdlibSource(kind="stdlib", split=split)))
        for split in ("train", "held_out")
    }
    names = {split: [d.where for d in texts] for split, texts in parts.items()}
    assert not set(names["train"]) & set(names["held_out"])
    assert all(group == sorted(group) for group in names.values())
    size = {split: sum(len(d.text.encode()) for d in texts) for split, texts in parts.items()}
    assert size["held_out"] > 200_000  # of Debian's Python 3.11, which is packaged in parts
    assert 0.02 < size["held_out"] / sum(size.values()) < 0.08
    excluded = {"test", "tests", "site-packages", "idle_test", "__pycache__"}
    assert not [n for group in names.values() for n in group if excluded & set(n.split("/")[:-1])]


def test_library_files_are_cut_between_lines_and_nothing_is_lost():
    whole = StdlibSource(kind="stdlib", split="held_out")
    parts = list(documents(StdlibSource(kind="stdlib", split="held_out", max_characters=500)))
    assert "".join(p.text for p in parts) == "".join(read(whole))
    for part in parts:
        assert len(part.text) <= 500 or len(part.text.splitlines()) == 1
    texts = {d.where: d.text for d in documents(whole)}
    for part in parts[:200]:
        name, line = part.where.rsplit(":", 1)
        assert texts[name].split("\n", int(line) - 1)[-1].startswith(part.text)


def test_which_file_is_held_out_is_fixed():
    names = ("pdb.py", "ast.py", "abc.py")
    assert [n for n in names if is_held_out(text_hash(n), 25)] == ["pdb.py"]


def test_a_text_file_is_one_document_with_its_newlines_untouched(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"two\r\n\n")
    (tmp_path / "a.txt").write_bytes(b"one")
    source = text_source(tmp_path / "*.txt")
    assert list(documents(source)) == [
        Document("one", str(tmp_path / "a.txt")),
        Document("two\r\n\n", str(tmp_path / "b.txt")),
    ]
    assert [f.size for f in source_files(source)] == [3, 6]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 18])
def test_separators_split_a_stream(tmp_path, suffix, chunk, monkeypatch):
    monkeypatch.setattr(text_files, "_CHUNK", max(chunk, 8) if suffix == ".zst" else chunk)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed(suffix, "é\n<>one<<>two\n\n<>three\n<>".encode()))
    parts = list(documents(text_source(path, separator="<>")))
    assert [d.text for d in parts] == ["é\n", "one<", "two\n\n", "three\n"]
    assert [d.where.rpartition(":")[2] for d in parts] == ["1", "2", "2", "4"]


def test_a_zst_file_may_hold_several_frames(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    lines = [json.dumps({"text": str(i)}).encode() + b"\n" for i in range(3)]
    path.write_bytes(b"".join(map(zstandard.compress, lines)))
    assert read(jsonl_source(path)) == ["0", "1", "2"]


@pytest.mark.parametrize("suffix", list(PACKERS)[1:])
def test_truncated_and_broken_archives_are_errors(tmp_path, suffix):
    data = packed(suffix, np.random.default_rng(0).bytes(10_000))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[:-20])
    with pytest.raises(UserError, match="ends early"):
        read(text_source(path), max_skipped=9)
    header = 4 if suffix == ".zst" else 10
    path.write_bytes(data[:header] + b"\xff" * 40 + data[header + 40 :])
    with pytest.raises(UserError, match="broken compressed data"):
        read(text_source(path), max_skipped=9)
    path.write_bytes(b"plain text, not an archive at all")
    with pytest.raises(UserError, match=r"is not compressed, .* says that it is; rename it"):
        read(text_source(path), max_skipped=9)
    renamed = path.rename(path.with_suffix(""))
    assert read(text_source(renamed)) == ["plain text, not an archive at all"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL.GZ", "a.jsonl.bz2"])
@pytest.mark.parametrize("suffix", list(PACKERS)[1:])
def test_the_first_bytes_say_how_a_file_is_compressed(tmp_path, suffix, name):
    (tmp_path / name).write_bytes(packed(suffix, b'{"text": "one"}\n{"text": "two"}\n'))
    assert read(jsonl_source(tmp_path / name)) == ["one", "two"]


def test_text_that_begins_like_bzip2_is_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"BZh9 is the mark of bzip2")
    assert read(text_source(tmp_path / "a.txt")) == ["BZh9 is the mark of bzip2"]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("chunk", [1, 2, 1 << 18])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix, chunk, monkeypatch):
    monkeypatch.setattr(text_files, "_CHUNK", max(chunk, 8) if suffix == ".zst" else chunk)
    mark = codecs.BOM_UTF8
    for name, data in (
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"}'),
        ("a.txt", b"one--two"),
        ("array.jsonl", b'[{"text": "one"}, {"text": "two"}]'),
    ):
        (tmp_path / name).write_bytes(packed(suffix, mark + data))
    assert read(jsonl_source(tmp_path / "a.jsonl")) == ["one", "two"]
    assert read(jsonl_source(tmp_path / "array.jsonl")) == ["one", "two"]
    assert read(text_source(tmp_path / "a.txt", separator="--")) == ["one", "two"]
    inside = b"a" + mark + b"b"  # there it is a character
    (tmp_path / "a.txt").write_bytes(packed(suffix, inside))
    assert read(text_source(tmp_path / "a.txt")) == [inside.decode()]


def test_utf_16_is_called_so(tmp_path):
    (tmp_path / "a.txt").write_text("hello", encoding="utf-16")
    with pytest.raises(UserError, match=r"a\.txt: is UTF-16 and not UTF-8"):
        read(text_source(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_text((tmp_path / "a.txt").read_text(encoding="utf-16"))
    assert read(text_source(tmp_path / "a.txt")) == ["hello"]


def test_a_file_with_several_names_is_read_once(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "again.txt").symlink_to("a.txt")
    os.link(tmp_path / "in" / "a.txt", tmp_path / "in" / "hard.txt")
    files = source_files(text_source(tmp_path / "in/**/*.txt", tmp_path / "in/*.txt"))
    assert [f.name for f in files] == [str(tmp_path / "in" / "a.txt")]


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt: is a pipe or a device"):
        read(text_source(tmp_path / "*.txt"))
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").write_text("its data")
    assert read(text_source(tmp_path / "*.txt")) == ["its data"]


def test_the_separator_of_whole_files_is_null(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    with pytest.raises(UserError, match="separator: is empty; write null to make each file one"):
        read(text_source(tmp_path / "a.txt", separator=""))
    assert read(text_source(tmp_path / "a.txt", separator=None)) == ["one two"]


ARRAY = (
    '[{"text": "one, \\"[x]\\""},\n {"text": "é", "n": 1234567, "in": [{"text": 0}]} '
    ',{"text":"3"}]\n'
)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 18])
def test_an_array_of_json_is_read_item_by_item(tmp_path, chunk, monkeypatch):
    monkeypatch.setattr(text_files, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text("\n " + ARRAY)
    parts = list(documents(jsonl_source(path)))
    assert [d.text for d in parts] == [item["text"] for item in json.loads(ARRAY)]
    assert [d.where for d in parts] == [f"{path}: item {i}" for i in (1, 2, 3)]


def test_numbers_of_an_array_are_not_cut_between_chunks(monkeypatch):
    assert list(json_array.items([b"[12", b"34,5", b"6", b"]"], json.JSONDecoder())) == [1234, 56]
    assert list(json_array.items([b" [ ", b"] "], json.JSONDecoder())) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"text": "one"}', "ends early"),
        ('[{"text": "one"} {"text": "two"}]', "expected ',', not '{'"),
        ('[{"text": "one"},]', "item 2: "),
        ('[{"text": "one"}, {"text"]', "item 2: "),
        ('[{"text": "one"}]\n{"text": "two"}', "after the end of the array"),
        ('[{"text": "one"}, ' + "[" * 100_000, "not a JSON array"),
        ('[{"text": "one"}, "\udcff"]', "not a JSON array"),
    ],
)
def test_a_broken_array_is_an_error(tmp_path, text, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as e:
        read(jsonl_source(path), max_skipped=9)
    assert str(e.value).startswith(f"{path}: not a JSON array") and reason in str(e.value)
    assert "\n" not in str(e.value)


def test_a_bad_item_of_an_array_is_skipped_and_reported(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('[{"text": "one"}, 3, {"texts": 0}, {"text": ""}, {"text": "two"}]')
    reports = []
    assert read(jsonl_source(path), max_skipped=3, report=reports.append) == ["one", "two"]
    assert "it has 'texts': name the one with the text" in reports[1]
    path.write_text('[{"texts": "three"}]')
    assert read(jsonl_source(path, field="texts")) == ["three"]
    assert [r.partition("; ")[0] for r in reports] == [
        f"{path}: item 2: not a JSON object",
        f"{path}: item 3: no field 'text'",
        f"{path}: item 4: empty document",
    ]


def test_a_number_of_any_length_is_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "n": ' + "7" * 5000 + "}\n")
    assert read(jsonl_source(path)) == ["one"]


@pytest.mark.parametrize(
    ("data", "separator", "reason"),
    [
        (b"one\r\n\r\ntwo", "\n\n", "end in CR LF"),
        (b"one\n\ntwo", "\\n\\n", "a backslash and an n"),
        (b"one\n\ntwo", "---", "check it"),
        (b"one\n\ntwo", "\n\n", None),
    ],
)
def test_a_separator_that_cuts_nothing_is_said(tmp_path, data, separator, reason, capfd):
    (tmp_path / "a.txt").write_bytes(data)
    texts = read(text_source(tmp_path / "a.txt", separator=separator))
    said = capfd.readouterr().err
    assert len(texts) == (1 if reason else 2)
    assert (reason in said and repr(separator) in said) if reason else not said


BAD_LINES = {
    b'{"text": "cut off': "malformed JSON",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": ""}': "empty document",
    b'["text"]': "not a JSON object",
    b'{"texts": "x"}': "no field 'text'",
    b'{"text": 3}': "is int, not text",
    b'{"text": "\\ud800"}': "unpaired surrogate",
    b'{"a": ' * 100_000: "nested too deeply",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=BAD_LINES.values())
def test_a_bad_line_is_an_error_or_skipped_and_reported(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}')
    with pytest.raises(UserError, match=reason) as e:
        read(jsonl_source(path))
    assert str(e.value).startswith(f"{path}:3: ") and "\n" not in str(e.value)
    reports = []
    assert read(jsonl_source(path), max_skipped=1, report=reports.append) == ["one", "two"]
    assert len(reports) == 1 and f"{path}:3: " in reports[0] and reason in reports[0]


def test_one_more_than_max_skipped_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + b"broken\n" * 3)
    assert read(jsonl_source(path), max_skipped=3) == ["one"]
    with pytest.raises(UserError, match=r"a\.jsonl:4: .*max_skipped=2"):
        read(jsonl_source(path), max_skipped=2)


def test_broken_text_documents_are_named_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n--two\n\xe9\n--three--\xff")
    reports = []
    source = text_source(path, separator="--")
    assert read(source, max_skipped=2, report=reports.append) == ["one\n", "three"]
    assert f"{path}:2: invalid UTF-8, byte 0xe9 1 lines into it" in reports[0]
    assert f"{path}:4: invalid UTF-8, byte 0xff" in reports[1]


def test_nothing_between_two_separators_is_no_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\n\n\none\n\n\n\n\n\ntwo\n\n\nthree\n\n")
    assert read(text_source(path, separator="\n\n")) == ["one", "two", "\nthree"]


def test_no_file_and_no_document_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"none\*\.txt: no file matches"):
        read(text_source(tmp_path / "none*.txt"))
    with pytest.raises(UserError, match=r"is a folder without \*\.txt files; name the files in it"):
        read(text_source(f"{tmp_path}/"))
    (tmp_path / "a.md").write_text("a page")
    assert read(text_source(tmp_path / "a.md")) == ["a page"]
    (tmp_path / "a.jsonl").write_bytes(b"\n")
    with pytest.raises(UserError, match="no documents"):
        read(jsonl_source(tmp_path / "a.jsonl"))
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(UserError, match="no documents"):
        read(text_source(tmp_path / "a.txt"), max_skipped=1)


def test_parquet_columns_are_read_and_checked(tmp_path):
    path = tmp_path / "a.parquet"
    column = pyarrow.array(["one", None, "two"], pyarrow.large_string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": [1, 2, 3]}), path)

    def source(field="text"):
        return ParquetSource(kind="parquet", files=(str(path),), field=field)

    reports = []
    assert read(source(), max_skipped=1, report=reports.append) == ["one", "two"]
    assert f"{path}: row 2" in reports[0]
    with pytest.raises(UserError, match="no column 'body'; it has text, n"):
        read(source("body"))
    with pytest.raises(UserError, match="row 1: field 'n' is int"):
        read(source("n"))
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not readable as Parquet"):
        read(source())


def test_a_pattern_of_files_further_down_is_proposed_and_matches(tmp_path):
    (tmp_path / "a[1]" / "b").mkdir(parents=True)
    (tmp_path / "a[1]" / "b" / "x.txt").write_text("one")
    for pattern in ("", "/", "/*.txt", "/*/*.txt", "/*.text", "/x.txt", "/a[[]1]/*.txt"):
        with pytest.raises(UserError, match=r"is a folder; write|no file matches; ") as e:
            read(text_source(f"{tmp_path}{pattern}"))
        proposal = str(e.value).split("'")[1]
        assert proposal.startswith(f"{tmp_path}/**/") and read(text_source(proposal)) == ["one"]
    for pattern in ("/y.txt", "/z/*.txt", "/a[[]1]/x.md"):
        with pytest.raises(UserError, match="no file matches; check the path"):
            read(text_source(f"{tmp_path}{pattern}"))


@pytest.fixture
def tfds_folder(tmp_path):
    """A TFDS dataset of three texts in two shards, written without TensorFlow."""
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int64})
    for shard, texts in enumerate([["one", "two"], ["three"]]):
        path = folder / f"tiny-train.array_record-{shard:05d}-of-00002"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for text in texts:
            writer.write(features.serialize_example({"text": text, "n": 1}))
        writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="tiny", split="train", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[2, 1], num_bytes=1, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[split], check_data=False
    )
    return folder


def test_tfds_datasets_are_read_by_folder_name_and_slice(tfds_folder):
    def source(name=str(tfds_folder), split="train", **kwargs):
        return TfdsSource(kind="tfds", name=name, split=split, **kwargs)

    assert read(source()) == ["one", "two", "three"]
    assert read(source(split="train[1:]")) == ["two", "three"]
    assert read(source("tiny", data_dir=str(tfds_folder.parents[1]))) == ["one", "two", "three"]
    assert len(source_files(source())) == 2
    with pytest.raises(UserError, match="no feature 'body'; features: n, text"):
        read(source(field="body"))
    with pytest.raises(UserError, match="'n' is int"):
        read(source(field="n"))
    with pytest.raises(UserError, match="splits: train"):
        read(source(split="valid"))
    with pytest.raises(UserError, match="TFDS no_such_dataset"):
        read(source("no_such_dataset", data_dir=str(tfds_folder.parents[1])))


def test_a_dataset_in_tfrecord_is_an_error_that_says_what_to_do(tfds_folder):
    info = tfds_folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for path in tfds_folder.glob("tiny-*"):
        path.rename(str(path).replace("array_record", "tfrecord"))
    for given in (
        {"name": str(tfds_folder)},
        {"name": "tiny", "data_dir": str(tfds_folder.parents[1])},
    ):
        with pytest.raises(
            UserError, match=rf"{tfds_folder} holds it as tfrecord, .*another data_dir"
        ):
            read(TfdsSource(kind="tfds", split="train", **given))
