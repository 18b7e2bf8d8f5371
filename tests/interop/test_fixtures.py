"""The files of tests/fixtures, which torch and transformers wrote, and their logits.

Files that are broken or hostile are made here, byte by byte, from those.
"""

import dataclasses
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jllama
from jllama.errors import UserError
from jllama.interop.hf import read_folder
from jllama.interop.pth import read_pth
from jllama.interop.safetensors import read_safetensors
from tests.tiny import relative_error

FIXTURES = Path(__file__).parent.parent / "fixtures"
PLAIN = FIXTURES / "pth" / "plain.pth"


# ----------------------------------------------------------------------------------------- models


def _check(model, name):
    reference = np.load(FIXTURES / f"{name}.npz")
    logits = model.logits(reference["ids"][None])[0, reference["positions"]]
    assert relative_error(logits, reference["logits"]) < 1e-5


@pytest.mark.parametrize("name", ["hf-llama3", "hf-llama2", "hf-old-tied", "hf-bin"])
def test_a_hugging_face_folder_gives_the_logits_that_transformers_gives(name):
    _check(jllama.load(FIXTURES / name, dtype="float32"), name)


@pytest.mark.parametrize("name", ["llama3", "llama2"])
def test_a_folder_of_meta_gives_its_logits_and_the_parameters_of_its_twin(name, tmp_path):
    twin = jllama.load(FIXTURES / f"hf-{name}", dtype="float32")
    file = tmp_path / "model.yaml"  # what params.json leaves out
    file.write_text(json.dumps(dataclasses.asdict(twin.config)))
    model = jllama.load(FIXTURES / f"meta-{name}", dtype="float32", model=str(file))
    _check(model, f"meta-{name}")
    jax.tree.map(np.testing.assert_array_equal, model.params, twin.params)


def test_a_folder_of_meta_that_is_no_known_model_needs_a_name():
    with pytest.raises(UserError, match="--model") as e:
        jllama.load(FIXTURES / "meta-llama3")
    _one_line(e, "meta-llama3")


# -------------------------------------------------------------------------------------------- pth


def test_tensors_that_torch_saved():
    tensors = {name: tensor.read() for name, tensor in read_pth(PLAIN).items()}
    np.testing.assert_array_equal(tensors["a"], np.arange(12, dtype=np.float32).reshape(3, 4))
    np.testing.assert_array_equal(tensors["b"].astype(np.float32), [1.5, -2.0])
    assert tensors["b"].dtype.name == "bfloat16"


def test_tensors_that_share_bytes():
    tensors = {name: t.read() for name, t in read_pth(FIXTURES / "pth" / "shared.pth").items()}
    np.testing.assert_array_equal(tensors["row"], tensors["a"][1])
    np.testing.assert_array_equal(tensors["rows"], tensors["a"][1:])


def test_attributes_of_tensors_are_left_out():
    tensors = read_pth(FIXTURES / "pth" / "attributes.pth")
    wanted = np.arange(12, dtype=np.float32).reshape(3, 4)
    for name, dtype in (("a", "float32"), ("b", "float64")):
        assert tensors[name].dtype == dtype
        np.testing.assert_array_equal(tensors[name].read(), wanted)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("legacy", "zip"), ("strided", "transposed.*contiguous"), ("list", "'list' is a list")],
)
def test_files_of_torch_that_are_refused(name, reason):
    with pytest.raises(UserError, match=reason) as e:
        read_pth(FIXTURES / "pth" / f"{name}.pth")
    _one_line(e, f"{name}.pth")


def _one_line(e, where):
    assert "\n" not in str(e.value) and where in str(e.value)


def _rewritten(file: Path, compression=zipfile.ZIP_STORED, **changed: bytes) -> Path:
    """plain.pth with other entries; `data_pkl` stands for data.pkl."""
    with zipfile.ZipFile(PLAIN) as old, zipfile.ZipFile(file, "w", compression) as new:
        for entry in old.namelist():
            key = entry.rpartition("/")[2].replace(".", "_")
            new.writestr(entry, changed.get(key, old.read(entry)))
    return file


class _Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_rewritten_file_is_still_read(tmp_path):
    assert read_pth(_rewritten(tmp_path / "x.pth")).keys() == {"a", "b"}


def test_a_pickle_runs_nothing(tmp_path):
    marker = tmp_path / "marker"
    program = pickle.dumps({"a": _Call(os.system, f"touch {marker}")}, protocol=2)
    with pytest.raises(UserError, match=r"posix\.system") as e:
        read_pth(_rewritten(tmp_path / "x.pth", data_pkl=program))
    _one_line(e, "x.pth")
    assert not marker.exists()
    pickle.loads(program)  # the program is one
    assert marker.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
        b"ccollections\nOrderedDict.fromkeys\n(S'x'\ntR.",
        b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93.",
        b"ccollections\nOrderedDict\n)R(S'__class__'\nS'x'\nd}b.",
        b"I1\n.",
        b"(lp0\n.",
        b"",
        b"\x80\x02",
        b"\xff\xff",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 62),  # a bytearray of 4 exabytes
        b"(" * 100_000 + b"t" * 100_000 + b".",
    ],
)
def test_other_pickles_are_refused(program, tmp_path):
    with pytest.raises(UserError) as e:
        read_pth(_rewritten(tmp_path / "x.pth", data_pkl=program))
    _one_line(e, "x.pth")


def test_a_small_pickle_takes_little_memory(tmp_path):
    # The place of an object in the unpickler's memory, of which it could make room for all before.
    program = b"\x80\x02}r" + struct.pack("<I", 1 << 28) + b"."
    file = _rewritten(tmp_path / "x.pth", data_pkl=program)
    script = (
        "import resource, sys; from pathlib import Path; from jllama.interop.pth import read_pth\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_pth(Path(sys.argv[1]))\n"
        "except Exception as e: print(e, file=sys.stderr)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, file], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 500_000, done.stderr  # KiB


def test_a_compressed_zip_is_refused(tmp_path):
    with pytest.raises(UserError, match="compressed") as e:
        read_pth(_rewritten(tmp_path / "x.pth", zipfile.ZIP_DEFLATED))
    _one_line(e, "x.pth")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    bomb = _rewritten(tmp_path / "x.pth", zipfile.ZIP_DEFLATED, data_pkl=bytes(100_000_000))
    assert bomb.stat().st_size < 200_000
    with pytest.raises(UserError, match="compressed"):
        read_pth(bomb)


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\x0ctQ"
NAME = b"X\1\0\0\0a"
AXES = b"(" + b"K\1" * 100_000 + b"t"


@pytest.mark.parametrize(
    "program",
    [
        # A key that takes 2^60 steps, or the whole stack, to hash.
        b"}()q\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"K\1u.",
        b"})" + b"\x85" * 300_000 + b"K\1s.",
        # Attributes of what reads it, and of the dict that comes out.
        TENSOR + b"(N}X\x0c\0\0\0__defaults__(K\0K\0K\0K\0tstb.",
        b"ccollections\nOrderedDict\n)R}X\5\0\0\0itemsK\1sbK\1\x85.",
        # Numbers too long to print, and too many axes.
        b"\x80\x02}\x8b" + struct.pack("<I", 2000) + b"\x7f" * 2000 + b"K\1s.",
        b"}" + NAME + TENSOR + b"(" + STORAGE + b"K\0" + AXES + AXES + b"tRs.",
        b"]" * 60_000_000 + b"l.",
        # Takes what lies below its mark, or nothing there is.
        b"}(" + NAME + b"K\1(uu.",
        b"\x80\x02\x86.",
        b"h\5.",
        b"}" + NAME + b"ccollections\nOrderedDict\n(K\1tRs.",
    ],
    ids=[
        "slow hash", "deep hash", "defaults", "items", "long number", "axes", "lists", "marks",
        "empty", "memo", "arguments",
    ],
)  # fmt: skip
def test_hostile_pickles_are_refused_in_a_moment(program, tmp_path):
    with pytest.raises(UserError) as e:
        read_pth(_rewritten(tmp_path / "x.pth", data_pkl=program))
    _one_line(e, "x.pth")
    assert read_pth(PLAIN).keys() == {"a", "b"}


def test_attributes_of_a_state_dict_are_left_alone(tmp_path):
    program = b"ccollections\nOrderedDict\n)R}X\5\0\0\0itemsK\1sb."
    assert read_pth(_rewritten(tmp_path / "x.pth", data_pkl=program)) == {}


@pytest.mark.parametrize("entry", ["data.pkl", "data/0"])
@pytest.mark.parametrize("size", [1 << 20, 0xFFFFFFFE])
def test_an_entry_that_says_it_is_larger_than_the_file(entry, size, tmp_path):
    data = bytearray(PLAIN.read_bytes())
    # In the central directory, the sizes lie 22 bytes before the name.
    name = data.rindex(f"plain/{entry}".encode())
    struct.pack_into("<II", data, name - 26, size, size)
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(UserError) as e:
        read_pth(tmp_path / "x.pth")
    _one_line(e, "x.pth")


def test_an_entry_that_is_smaller_than_its_tensor(tmp_path):
    with pytest.raises(UserError, match="a is") as e:
        read_pth(_rewritten(tmp_path / "x.pth", **{"0": bytes(20)}))
    _one_line(e, "x.pth")


@pytest.mark.parametrize("size", [0, 1, 100, 1000, -1])
def test_a_truncated_pth(size, tmp_path):
    (tmp_path / "x.pth").write_bytes(PLAIN.read_bytes()[:size])
    with pytest.raises(UserError, match="truncated") as e:
        read_pth(tmp_path / "x.pth")
    _one_line(e, "x.pth")


# ------------------------------------------------------------------------------------- safetensors

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]}


def _safetensors(folder: Path, header, data: bytes = bytes(32), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    file = folder / "x.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + text + data)
    return file


def test_a_sound_safetensors_file(tmp_path):
    tensors = read_safetensors(_safetensors(tmp_path, {"a": A, "b": B}))
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        "a": ((2, 3), "float32"),
        "b": ((4,), "float16"),
    }


BROKEN_HEADERS = {
    "overlap": {"a": A, "b": {**B, "data_offsets": [20, 28]}},
    "gap": {"a": A, "b": {**B, "data_offsets": [25, 33]}},
    "not from the start": {"b": B},
    "too few bytes for the shape": {"a": {**A, "shape": [2, 4]}, "b": B},
    "backwards": {"a": A, "b": {**B, "data_offsets": [32, 24]}},
    "negative": {"a": A, "b": {**B, "shape": [-4], "data_offsets": [24, 16]}},
    "shape that overflows": {"a": {**A, "shape": [1 << 62, 1 << 62]}, "b": B},
    "shape of truths": {"a": A, "b": {**B, "shape": [True, 4]}},
    "shape of fractions": {"a": A, "b": {**B, "shape": [4.0]}},
    "unknown dtype": {"a": {**A, "dtype": "F31"}, "b": B},
    "dtype that is a list": {"a": {**A, "dtype": ["F32"]}, "b": B},
    "no offsets": {"a": {"dtype": "F32", "shape": [2, 3]}, "b": B},
    "no entry": {"a": A, "b": 3},
    "twice": b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}",
    "a list": [A, B],
    "no JSON": b"{'a': 1}",
    "no UTF-8": b'{"a\xff": 1}',
    "nested": b"[" * 100_000,
    "NaN": b'{"a": NaN}',
    "empty": b"",
}


@pytest.mark.parametrize("header", BROKEN_HEADERS.values(), ids=BROKEN_HEADERS)
def test_a_broken_header(header, tmp_path):
    with pytest.raises(UserError) as e:
        read_safetensors(_safetensors(tmp_path, header))
    _one_line(e, "x.safetensors")


@pytest.mark.parametrize("length", [10_000, 200_000_000, (1 << 63) + 5, (1 << 64) - 1])
def test_a_header_longer_than_the_file(length, tmp_path):
    with pytest.raises(UserError, match="header") as e:
        read_safetensors(_safetensors(tmp_path, {"a": A, "b": B}, length=length))
    _one_line(e, "x.safetensors")


def test_a_header_of_200_megabytes(tmp_path):
    file = _safetensors(tmp_path, {"a": A, "b": B}, length=200_000_000)
    os.truncate(file, 300_000_000)  # sparse
    with pytest.raises(UserError, match="header") as e:
        read_safetensors(file)
    _one_line(e, "x.safetensors")


@pytest.mark.parametrize("data", [b"", bytes(31), bytes(33)])
def test_data_of_another_size(data, tmp_path):
    with pytest.raises(UserError, match=r"truncated|after its end") as e:
        read_safetensors(_safetensors(tmp_path, {"a": A, "b": B}, data))
    _one_line(e, "x.safetensors")


@pytest.mark.parametrize("size", [0, 4, 8, 100])
def test_a_truncated_file(size, tmp_path):
    shard = FIXTURES / "hf-llama3" / "model-00001-of-00002.safetensors"
    (tmp_path / "x.safetensors").write_bytes(shard.read_bytes()[:size])
    with pytest.raises(UserError, match="truncated") as e:
        read_safetensors(tmp_path / "x.safetensors")
    _one_line(e, "x.safetensors")


# ------------------------------------------------------------------------------------------- index


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    shutil.copytree(FIXTURES / "hf-llama3", folder)
    return folder


def _redirect(folder: Path, place: object) -> None:
    index = folder / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    text["weight_map"]["lm_head.weight"] = place
    index.write_text(json.dumps(text))


@pytest.mark.parametrize(
    "place", ["../x.safetensors", "/etc/x.safetensors", "..", "sub/x.safetensors", "a\\x", "", 3]
)
def test_an_index_that_leaves_the_folder(place, sharded):
    shutil.copy(sharded / "model-00002-of-00002.safetensors", sharded.parent / "x.safetensors")
    _redirect(sharded, place)
    with pytest.raises(UserError) as e:
        read_folder(sharded, os.listdir(sharded))
    _one_line(e, "model.safetensors.index.json")


def test_an_index_that_names_a_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors") as e:
        read_folder(sharded, os.listdir(sharded))
    _one_line(e, "model.safetensors.index.json")


def _same_as_before(folder: Path) -> None:
    _, wanted = read_folder(FIXTURES / "hf-llama3", os.listdir(FIXTURES / "hf-llama3"))
    _, tensors = read_folder(folder, os.listdir(folder))
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), wanted[name].read())


def test_an_index_that_names_the_wrong_shard_finds_the_tensor(sharded):
    tensors = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in tensors.values() if file != tensors["lm_head.weight"])
    _redirect(sharded, other)
    _same_as_before(sharded)


def test_an_index_may_list_buffers_and_folders_inside_and_stand_for_pytorch(sharded):
    index = sharded / "model.safetensors.index.json"
    file_of = json.loads(index.read_text())["weight_map"]
    (sharded / "inside").mkdir()
    moved = file_of["lm_head.weight"]
    (sharded / moved).rename(sharded / "inside" / moved)
    file_of = {n: f"inside/{f}" if f == moved else f"./{f}" for n, f in file_of.items()}
    file_of["model.layers.0.self_attn.rotary_emb.inv_freq"] = f"inside/{moved}"
    index.unlink()
    text = json.dumps({"weight_map": file_of})
    (sharded / "pytorch_model.bin.index.json").write_text(text)
    _same_as_before(sharded)


def test_what_an_index_lists_and_no_file_holds_is_missing(sharded):
    index = sharded / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    place = text["weight_map"].pop("lm_head.weight")
    text["weight_map"]["lm_head.other"] = place
    index.write_text(json.dumps(text))
    _same_as_before(sharded)  # the head is in a file that the index names
    tensors = load_file(sharded / place)
    del tensors["lm_head.weight"]
    save_file(tensors, sharded / place)
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        jllama.load(sharded)
