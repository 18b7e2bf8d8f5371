"""Meta's folders: the model is found or named, and never guessed."""

import dataclasses
import json
import os

import numpy as np
import pytest

from jllama.config import recipe as recipes
from jllama.errors import UserError
from jllama.interop import meta
from jllama.interop.tensors import in_file

# What Meta's own files say.
LLAMA2_7B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5}
LLAMA3_8B = LLAMA2_7B | {"n_kv_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256}
LLAMA_34B = LLAMA2_7B | {"dim": 8192, "n_layers": 48, "n_heads": 64, "n_kv_heads": 8}


def tensor(*shape):
    return in_file(None, 0, shape, "float16")


def tensors(vocab_size, dim, ffn, tied=False):
    found = {
        "tok_embeddings.weight": tensor(vocab_size, dim),
        "layers.0.feed_forward.w1.weight": tensor(ffn, dim),
        "output.weight": tensor(vocab_size, dim),
    }
    if tied:
        del found["output.weight"]
    return found


def model(tmp_path, params, found, name=None):
    (tmp_path / meta.META_PARAMS).write_text(json.dumps(params))
    facts = meta._facts(tmp_path / meta.META_PARAMS, found)
    return meta._model(tmp_path, facts, name)


@pytest.mark.parametrize(
    ("name", "params", "found"),
    [
        ("llama-7b", LLAMA2_7B | {"norm_eps": 1e-6, "vocab_size": -1}, (32000, 4096, 11008)),
        ("llama2-7b", LLAMA2_7B | {"vocab_size": -1}, (32000, 4096, 11008)),
        ("codellama-7b", LLAMA2_7B | {"rope_theta": 1e6}, (32016, 4096, 11008)),
        ("codellama-34b", LLAMA_34B | {"rope_theta": 1e6}, (32000, 8192, 22016)),
        ("llama3-8b", LLAMA3_8B, (128256, 4096, 14336)),
        ("llama3.1-8b", LLAMA3_8B | {"use_scaled_rope": True}, (128256, 4096, 14336)),
        (
            "llama3.2-1b",
            LLAMA3_8B | {"dim": 2048, "n_layers": 16, "use_scaled_rope": True},
            (128256, 2048, 8192, True),
        ),
        (  # as published: the tied head is in the file
            "llama3.2-1b",
            LLAMA3_8B | {"dim": 2048, "n_layers": 16, "use_scaled_rope": True},
            (128256, 2048, 8192),
        ),
    ],
)
def test_published_folders_are_found(tmp_path, name, params, found):
    assert model(tmp_path, params, tensors(*found)) == recipes.load_model(name)


def test_a_folder_that_fits_two_models_is_refused(tmp_path):
    # Llama 2 34B and Code Llama 34B differ in the base of RoPE alone, which is not said.
    found = tensors(32000, 8192, 22016)
    with pytest.raises(UserError, match=r"may be codellama-34b or llama2-34b.*--model"):
        model(tmp_path, LLAMA_34B, found)
    assert model(tmp_path, LLAMA_34B, found, "llama2-34b").rope_theta == 1e4


def test_an_unknown_model_must_be_named(tmp_path):
    # Code Llama Python: Llama 2's shapes, another base.
    params, found = LLAMA2_7B | {"rope_theta": 1e6}, tensors(32000, 4096, 11008)
    with pytest.raises(
        UserError,
        match=r"no model in configs/model has .*rope_theta: 1000000\.0 and rope of kind none",
    ):
        model(tmp_path, params, found)
    with pytest.raises(UserError, match=r"is not llama2-7b: rope_theta is 1000000\.0 .*, 10000"):
        model(tmp_path, params, found, "llama2-7b")


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "not readable as JSON"),
        (json.dumps(LLAMA2_7B | {"quantization_args": {}}), "quantization_args"),
        (json.dumps(LLAMA2_7B | {"dim": "4096"}), 'dim is "4096"'),
        (
            json.dumps({k: v for k, v in LLAMA2_7B.items() if k != "norm_eps"}),
            "norm_eps is missing",
        ),
        (json.dumps(LLAMA2_7B | {"vocab_size": 128256}), "vocab_size=128256, and .* 32,000 rows"),
        (json.dumps(LLAMA2_7B | {"use_scaled_rope": "false"}), 'use_scaled_rope is "false"'),
        (json.dumps(LLAMA2_7B | {"n_kv_heads": 0}), "n_kv_heads is 0"),
    ],
    ids=["list", "broken", "unknown", "text", "missing", "vocabulary", "flag", "zero"],
)
def test_bad_params_are_one_line(tmp_path, params, said):
    (tmp_path / meta.META_PARAMS).write_text(params)
    with pytest.raises(UserError, match=said) as e:
        meta._facts(tmp_path / meta.META_PARAMS, tensors(32000, 4096, 11008))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("tok_embeddings.weight", (96, 16), 1),  # LLaMA 1 and 2
        ("tok_embeddings.weight", (48, 32), 0),  # Llama 3
        ("output.weight", (48, 32), 0),
        ("layers.3.attention.wq.weight", (16, 32), 0),
        ("layers.3.attention.wo.weight", (32, 16), 1),
        ("layers.3.feed_forward.w2.weight", (32, 24), 1),
    ],
)
def test_shards_are_cut_along_the_right_axis(tmp_path, name, shape, axis):
    joined = meta._joined(tmp_path, name, (tensor(*shape), tensor(*shape)), dim=32)
    assert joined.shape[axis] == 2 * shape[axis]


def test_shards_of_what_is_no_matrix_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"attention\.wo\.weight: \[\[8\], \[8\]\] are no matrices"):
        meta._joined(tmp_path, "layers.0.attention.wo.weight", (tensor(8), tensor(8)), dim=32)


def test_a_folder_without_params_json_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"params\.json: no such file"):
        meta._facts(tmp_path / meta.META_PARAMS, {})


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path, monkeypatch, same):
    tied = dataclasses.replace(recipes.load_model("llama3.2-1b"), vocab_size=4, hidden_dim=2)
    (tmp_path / "data").write_bytes(np.arange(16, dtype=np.float16).tobytes())
    found = {
        "tok_embeddings.weight": in_file(tmp_path / "data", 0, (4, 2), "float16"),
        "output.weight": in_file(tmp_path / "data", 0 if same else 16, (4, 2), "float16"),
    }
    monkeypatch.setattr(meta, "_tensors", lambda *_: found)
    monkeypatch.setattr(meta, "_facts", lambda *_: {})
    monkeypatch.setattr(meta, "_model", lambda *_: tied)
    if same:
        assert meta.read_folder(tmp_path, [], None)[1].keys() == {"tok_embeddings.weight"}
    else:
        with pytest.raises(UserError, match=r"output\.weight differs from tok_embeddings"):
            meta.read_folder(tmp_path, [], None)


def test_norms_must_be_equal_in_all_shards(tmp_path):
    parts = []
    for i in range(2):
        (tmp_path / str(i)).write_bytes(np.full(32, 1.5, np.float16).tobytes())
        parts.append(in_file(tmp_path / str(i), 0, (32,), "float16"))
    joined = meta._joined(tmp_path, "layers.0.ffn_norm.weight", tuple(parts), dim=32)
    assert joined.shape == (32,)
    assert (joined.read() == 1.5).all()
    (tmp_path / "1").write_bytes(np.full(32, 2.5, np.float16).tobytes())
    with pytest.raises(UserError, match=r"ffn_norm\.weight: shard 1 differs from shard 0"):
        joined.read()


@pytest.mark.parametrize("there", [(), (1,), (0, 2)], ids=str)
def test_missing_shards(tmp_path, there):
    for number in there:
        (tmp_path / f"consolidated.{number:02d}.pth").touch()
    with pytest.raises(UserError, match=r"consolidated\.00\.pth and on without a gap"):
        meta._tensors(tmp_path, os.listdir(tmp_path))
