"""Hugging Face folders: the safetensors library reads what we write, and we read it back."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jllama
from jllama.errors import StorageError, UserError
from jllama.interop import hf
from jllama.interop.names import NAMES

MODEL = tiny.config(num_kv_heads=2, rope=tiny.LLAMA3)


@pytest.fixture(scope="module")
def params():
    return tiny.params(MODEL)


@pytest.fixture
def folder(tmp_path, params):
    hf.write_folder(tmp_path / "model", MODEL, params, None)
    return tmp_path / "model"


def rewrite(folder, **tensors):
    """The folder's tensors with others in their place; None removes one."""
    file = folder / "model.safetensors"
    found = load_file(file) | {name.replace("__", "."): t for name, t in tensors.items()}
    save_file({name: t for name, t in found.items() if t is not None}, file)


def change(folder, **keys):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_the_library_reads_every_bit_under_its_name(folder, params):
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(
            name.of("hf", layer) for name in NAMES for layer in range(3 if name.stacked else 1)
        )
        q = np.asarray(params["layers"]["attention"]["q"]["kernel"])[1]
        wanted = q.reshape(48, 64).T
        np.testing.assert_array_equal(
            file.get_tensor("model.layers.1.self_attn.q_proj.weight"), wanted
        )
        o = np.asarray(params["layers"]["attention"]["o"]["kernel"])[2]
        np.testing.assert_array_equal(
            file.get_tensor("model.layers.2.self_attn.o_proj.weight"), o.reshape(64, 48).T
        )


def test_it_loads_back_bit_for_bit(folder, params):
    model = jllama.load(folder)
    assert (model.config.rope, model.config.rope_theta) == (MODEL.rope, MODEL.rope_theta)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


def test_a_folder_without_a_tokenizer_has_logits_and_no_texts(folder, params):
    model = jllama.load(folder)
    assert model.tokenizer is None
    tokens = tiny.tokens(1, 7)
    assert tiny.relative_error(model.logits(tokens), tiny.logits(params, MODEL, tokens)) < 1e-6
    for prompt in ("text", [1, 2]):
        with pytest.raises(UserError, match="no tokenizer"):
            model.generate(prompt)


def test_shards_hold_at_most_their_bytes_and_the_index_finds_all(tmp_path, params):
    folder = tmp_path / "sharded"
    hf.write_folder(folder, MODEL, params, None, shard_bytes=60_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 60_000 for file in files)
    held = {name: file.name for file in files for name in load_file(file)}
    assert held == index["weight_map"]
    total = sum(t.nbytes for file in files for t in load_file(file).values())
    assert index["metadata"]["total_size"] == total
    jax.tree.map(np.testing.assert_array_equal, jllama.load(folder).params, params)


def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path):
    tied = tiny.config(tie_embeddings=True)
    folder = tmp_path / "tied"
    hf.write_folder(folder, tied, tiny.params(tied), None)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lm_head__weight=table.copy())
    assert "head" not in jllama.load(folder).params
    for dtype in ("uint8", "uint16"):
        codes = table.astype(dtype)
        rewrite(folder, lm_head__weight=codes, model__embed_tokens__weight=codes)
        with pytest.raises(UserError, match=r"not weights: model\.embed_tokens"):
            jllama.load(folder)
    # The same values, in another dtype and with another zero.
    table[0] = 0
    copy = np.where(table == 0, -table, table).astype(np.float64)
    rewrite(folder, lm_head__weight=copy, model__embed_tokens__weight=table)
    assert "head" not in jllama.load(folder).params
    rewrite(folder, lm_head__weight=table + 1, model__embed_tokens__weight=table)
    with pytest.raises(
        UserError, match=r"lm_head\.weight differs .* set tie_word_embeddings to false"
    ):
        jllama.load(folder)
    change(folder, tie_word_embeddings=False)
    np.testing.assert_array_equal(jllama.load(folder).params["head"]["weight"], table + 1)


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("inner", [False, True], ids=["whole", "LlamaModel"])
def test_a_tied_model_needs_one_table_under_either_name(tmp_path, kept, inner):
    tied = tiny.config(tie_embeddings=True)
    params = tiny.params(tied)
    hf.write_folder(tmp_path / "tied", tied, params, None)
    file = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(file)
    tensors[kept] = tensors.pop("model.embed_tokens.weight")
    save_file({n.removeprefix("model.") if inner else n: t for n, t in tensors.items()}, file)
    jax.tree.map(np.testing.assert_array_equal, jllama.load(tmp_path / "tied").params, params)


def test_float64_weights_are_rounded_and_that_is_said(folder, params, capsys):
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.astype(np.float64) for n, t in tensors.items()}, folder / "model.safetensors")
    model = jllama.load(folder)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert f"note: {folder}: its float64 tensors are rounded" in capsys.readouterr().err


def test_whole_weights_may_stand_beside_the_quantisation_of_a_training(folder, params, capsys):
    for settings in ({"quant_method": "bitsandbytes"}, {"load_in_4bit": True}):
        change(folder, quantization_config=settings)
        jax.tree.map(np.testing.assert_array_equal, jllama.load(folder).params, params)
    assert "quantization_config (bitsandbytes) has no effect" in capsys.readouterr().err
    # Of other methods nobody knows what they do to whole weights; the way out works.
    change(folder, quantization_config={"quant_method": "bitnet"})
    with pytest.raises(UserError, match=r"bitnet.*take the key out"):
        jllama.load(folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    del settings["quantization_config"]
    file.write_text(json.dumps(settings))
    jax.tree.map(np.testing.assert_array_equal, jllama.load(folder).params, params)


def test_quantised_weights_are_called_so(folder):
    change(folder, quantization_config={"quant_method": "gptq"})
    rewrite(folder, model__layers__0__mlp__up_proj__qweight=np.zeros((4, 4), np.int32))
    with pytest.raises(UserError, match=r"\(gptq\): the weights are quantised .*before"):
        jllama.load(folder)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    (folder / "quantize_config.json").write_text("{}")
    with pytest.raises(UserError, match="quantised with GPTQ"):
        jllama.load(folder)


def test_what_generation_does_otherwise_is_said(folder, capsys):
    told = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "min_p": None}
    (folder / "generation_config.json").write_text(json.dumps(told | {"eos_token_id": 2}))
    jllama.load(folder)
    said = capsys.readouterr().err
    assert "generation_config.json: temperature=0.6, top_p=0.9: not followed" in said


def test_rotary_buffers_of_old_folders_are_no_parameters(folder, params):
    rewrite(folder, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(8, np.float32))
    jax.tree.map(np.testing.assert_array_equal, jllama.load(folder).params, params)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"model__layers__1__mlp__up_proj__weight": None}, r"missing: model\.layers\.1\.mlp\.up"),
        ({"lm_head__weight": np.zeros((98, 48), np.float32)}, r"misshapen: lm_head\.weight"),
        ({"lm_head__weight": np.zeros((97, 48), np.uint8)}, r"not weights: lm_head\.weight .*U8"),
        ({"score__weight": np.zeros((2, 48), np.float32)}, r"extra: score\.weight"),
    ],
    ids=["missing", "misshapen", "quantised", "extra"],
)
def test_tensors_of_another_model_are_listed(folder, tensors, said):
    rewrite(folder, **tensors)
    with pytest.raises(UserError, match=said) as e:
        jllama.load(folder)
    assert "\n" not in str(e.value)


def test_a_name_of_a_file_breaks_no_line_and_commands_no_terminal(folder):
    rewrite(folder, **{"evil\n\x1b[2J": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match=r"extra: evil\\n\\x1b\[2J \(no such"):
        jllama.load(folder)


def test_what_the_architecture_cannot_express_is_refused_by_name(folder):
    change(folder, attention_bias=True)
    with pytest.raises(UserError, match="attention_bias"):
        jllama.load(folder)


def test_a_folder_without_weights_is_an_error(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights: expected model\.safetensors"):
        jllama.load(folder)


def test_one_file_counts_before_an_index_as_in_transformers(folder, tmp_path, params):
    shards = tmp_path / "shards"
    other = jax.tree.map(lambda x: x + 1, params)
    hf.write_folder(shards, MODEL, other, None, shard_bytes=100_000)
    (shards / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, jllama.load(shards).params, params)


def test_a_failed_writing_leaves_nothing(tmp_path, params, monkeypatch):
    target = tmp_path / "out"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_safetensors", full)
    with pytest.raises(StorageError, match="No space left"):
        hf.write_folder(target, MODEL, params, None)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_replaced(folder, params):
    with pytest.raises(UserError, match="exists; choose another name, or remove it"):
        hf.write_folder(folder, MODEL, params, None)
    jllama.load(folder)
    hf.write_folder(folder.with_name("another"), MODEL, params, None)
    shutil.rmtree(folder)
    hf.write_folder(folder, MODEL, params, None)


def test_a_model_that_it_cannot_express_is_not_written(tmp_path):
    own = tiny.config(qk_norm=True)
    with pytest.raises(UserError, match=r"[qk]_norm"):
        hf.write_folder(tmp_path / "out", own, tiny.params(own), None)
    assert list(tmp_path.iterdir()) == []
