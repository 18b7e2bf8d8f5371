"""PEFT adapters: those that peft wrote, those that we write, and those that cannot be read."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import jllama
from jllama.adapt.lora import attach, matrices, overlay_specs, ranks_and_alphas
from jllama.adapt.merge import merge_overlay
from jllama.config import LoraConfig, LoraOverride
from jllama.errors import UserError
from jllama.interop.peft import read_adapter
from jllama.interop.peft_write import write_adapter
from jllama.model import llama

FIXTURES = Path(__file__).parent.parent / "fixtures"
MODEL = tiny.config(num_kv_heads=2)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Q = f"{PREFIX}model.layers.{{}}.self_attn.q_proj"
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"


# ---------------------------------------------------------------------------------- what peft wrote


@pytest.fixture(scope="module", params=["peft-whole", "peft-dora", "peft-tied"])
def adapted(request):
    folder = FIXTURES / request.param
    name = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    base = jllama.load(FIXTURES / name, dtype="float32")
    return folder, base, *read_adapter(folder, base.config, base.params)


def test_an_adapter_gives_the_logits_that_peft_gives(adapted):
    folder, base, lora, overlay = adapted
    reference = np.load(folder.with_suffix(".npz"))
    tokens = reference["ids"][None]

    @jax.jit
    def run(params, collection):
        positions = jnp.arange(tokens.shape[1])[None]
        hidden, _ = llama.apply(
            params, base.config, base.compute, tokens, positions, lora=collection
        )
        return llama.logits(params, base.config, hidden[:, reference["positions"]])[0]

    merged, _ = merge_overlay(lora, base.params, overlay)
    for logits in run(*attach(lora, base.params, overlay)), run(merged, None):
        assert tiny.relative_error(logits, reference["logits"]) < 1e-5
    assert tiny.relative_error(run(base.params, None), reference["logits"]) > 0.1


def test_an_adapter_that_is_written_again_keeps_every_bit(adapted, tmp_path):
    folder, base, lora, overlay = adapted
    write_adapter(tmp_path / "out", base.config, lora, overlay, "there")
    if folder.name != "peft-dora":  # which has its tables in another form
        before, after = (load_file(f / WEIGHTS) for f in (folder, tmp_path / "out"))
        assert before.keys() == after.keys()
        for name in before:
            np.testing.assert_array_equal(before[name], after[name], strict=True)
    again, same = read_adapter(tmp_path / "out", base.config)
    jax.tree.map(np.testing.assert_array_equal, same, overlay)
    assert (again.rank, again.alpha, again.rslora) == (lora.rank, lora.alpha, lora.rslora)


def test_low_rank_tables_are_worked_out_with_the_base(capsys):
    folder, base = FIXTURES / "peft-dora", jllama.load(FIXTURES / "hf-llama3", dtype="float32")
    # peft saves a low-rank table's base beside it, and that is the one that counts.
    capsys.readouterr()
    read_adapter(folder, base.config)
    assert "worked out with the base: embedding, head" in capsys.readouterr().err


# -------------------------------------------------------------------------------- what we write


def _lora(**changes) -> LoraConfig:
    return LoraConfig(**{"kind": "lora", "rank": 4, "alpha": 6.5, **changes})


def _random(lora, model=MODEL):
    """An overlay with no zeros but those that a lower rank has."""
    specs = overlay_specs(model, tiny.compute(), lora)
    rng = np.random.default_rng(0)
    overlay = jax.tree.map(lambda spec: rng.normal(size=spec.shape).astype(np.float32), specs)
    for path, leaf in matrices(overlay).items():
        for layer, (rank, _) in enumerate(ranks_and_alphas(path, lora, model.num_layers)):
            leaf["a"][layer, ..., rank:] = leaf["b"][layer, rank:] = 0
    return overlay


KINDS = {
    "all seven": _lora(),
    "rsLoRA, two targets": _lora(rslora=True, targets=("q", "down"), dropout=0.25),
    "DoRA": _lora(dora=True, full=("final_norm",)),
    "other ranks": _lora(
        overrides=(
            LoraOverride(match="layers.mlp.*", rank=2),
            LoraOverride(match="q", layers=(0, 2), rank=7, alpha=1.5),
            LoraOverride(match="down", alpha=3.0),
        )
    ),
    "whole": _lora(targets=("q",), full=("embedding", "head", "*norm", "o")),
    "nothing low-rank": _lora(targets=(), full=("embedding",)),
}


@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_a_written_adapter_is_read_back(lora, tmp_path):
    overlay = _random(lora)
    write_adapter(tmp_path / "out", MODEL, lora, overlay, "base")
    again, same = read_adapter(tmp_path / "out", MODEL)
    jax.tree.map(np.testing.assert_array_equal, same, overlay)
    specs = overlay_specs(MODEL, tiny.compute(), again)
    assert jax.tree.map(np.shape, same) == jax.tree.map(lambda spec: spec.shape, specs)
    for path in ("layers.attention.q", "layers.mlp.down", "layers.mlp.up"):
        assert ranks_and_alphas(path, again, 3) == ranks_and_alphas(path, lora, 3)
    for field in ("rslora", "dora", "dropout"):
        assert getattr(again, field) == getattr(lora, field)
    assert {*again.targets} == {*lora.targets}


def test_a_tied_embedding_is_written_for_both_of_its_uses(tmp_path):
    model, lora = tiny.config(tie_embeddings=True), _lora(targets=("q",), full=("embedding",))
    overlay = _random(lora, model)
    write_adapter(tmp_path / "out", model, lora, overlay, "base")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    np.testing.assert_array_equal(tensors[f"{HEAD}.weight"], tensors[f"{EMBEDDING}.weight"])
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["ensure_weight_tying"]
    _, same = read_adapter(tmp_path / "out", model)
    jax.tree.map(np.testing.assert_array_equal, same, overlay)


def test_padding_of_a_table_is_not_written(tmp_path):
    model, lora = tiny.config(num_kv_heads=2, vocab_multiple=64), _lora(full=("embedding", "head"))
    overlay = _random(lora, model)
    for name in ("embedding", "head"):
        overlay[name]["weight"][97:] = 0
    write_adapter(tmp_path / "out", model, lora, overlay, "base")
    assert load_file(tmp_path / "out" / WEIGHTS)[f"{HEAD}.weight"].shape == (97, 48)
    _, same = read_adapter(tmp_path / "out", model)
    jax.tree.map(np.testing.assert_array_equal, same, overlay)


def test_half_precision_is_kept(tmp_path):
    lora = _lora(targets=("q",))
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), _random(lora))
    write_adapter(tmp_path / "out", MODEL, lora, half, "base")
    assert {t.dtype.name for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {"bfloat16"}
    _, same = read_adapter(tmp_path / "out", MODEL)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float32)), same, half
    )


def test_a_layer_without_an_overlay_is_left_out(tmp_path):
    lora = _lora(targets=("q", "v"))
    overlay = _random(lora)
    for part in overlay["layers"]["attention"]["q"].values():
        part[1] = 0
    write_adapter(tmp_path / "out", MODEL, lora, overlay, "base")
    assert f"{Q.format(1)}.lora_A.weight" not in load_file(tmp_path / "out" / WEIGHTS)
    targets = json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"]
    layers = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 2)]
    assert targets == [*layers, "v_proj"]
    again, same = read_adapter(tmp_path / "out", MODEL)
    jax.tree.map(np.testing.assert_array_equal, same, overlay)
    ranks = [rank for rank, _ in ranks_and_alphas("layers.attention.q", again, 3)]
    assert ranks == [lora.rank, 0, lora.rank]
    write_adapter(tmp_path / "back", MODEL, again, same, "base")
    kept = load_file(tmp_path / "out" / WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, load_file(tmp_path / "back" / WEIGHTS), kept)


def test_overlays_that_cannot_be_written(tmp_path):
    lora = _lora(targets=("q",), overrides=(LoraOverride(match="q", layers=(1,), rank=2),))
    overlay = _random(_lora(targets=("q",)))
    with pytest.raises(UserError, match=r"layers\.attention\.q: has more than rank 2 in layer 1"):
        write_adapter(tmp_path / "out", MODEL, lora, overlay, "base")
    with pytest.raises(UserError, match="has no name in other formats"):
        write_adapter(tmp_path / "out", tiny.config(qk_norm=True), lora, overlay, "base")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="exists"):
        write_adapter(tmp_path, MODEL, _lora(targets=("q",)), overlay, "base")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


# ------------------------------------------------------------------------------------ bad input


@pytest.fixture
def adapter(tmp_path):
    """`adapter(**changes)`: a folder, with keys of its config changed; and its tensors, to save."""
    folder = tmp_path / "adapter"
    lora = _lora(targets=("q", "v"), full=("embedding", "head"))
    write_adapter(folder, MODEL, lora, _random(lora), "base")
    tensors = load_file(folder / WEIGHTS)

    def change(**changes):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))
        save_file(tensors, folder / WEIGHTS)
        return folder

    return change, tensors


def _refused(folder, *said, model=MODEL, base=None):
    with pytest.raises(UserError) as e:
        read_adapter(folder, model, base)
    text = str(e.value)
    assert "\n" not in text and str(folder) in text
    for part in said:
        assert part in text


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("peft_type", "IA3", "merge_and_unload"),
        ("peft_type", "PROMPT_TUNING", "only LORA"),
        ("bias", "all", "none"),
        ("fan_in_fan_out", True, "[outputs, inputs]"),
        ("lora_bias", True, "LLaMA, which has none"),
        ("task_type", "SEQ_CLS", "CAUSAL_LM"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "olora", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "loftq", "merge_and_unload"),
        ("trainable_token_indices", [1, 2], "merge_and_unload"),
        ("target_parameters", ["q_proj.weight"], "merge_and_unload"),
        ("layer_replication", [[0, 2], [1, 3]], "a base whose layers are so repeated"),
        ("alora_invocation_tokens", [5], "token"),
        ("use_qalora", True, "write false"),
        ("kasa_config", {"beta": 1.0}, "merge_and_unload"),
        ("r", 0, "greater than or equal to 1"),
        ("r", "eight", "integer"),
        ("lora_alpha", -1, "greater than 0"),
        ("lora_dropout", 1.0, "less than 1"),
        ("rank_pattern", {"q_proj": 0}, "greater than or equal to 1"),
        ("target_modules", 7, "valid"),
    ],
)
def test_a_key_that_cannot_be_read(adapter, key, value, remedy):
    change, _ = adapter
    _refused(change(**{key: value}), key, remedy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": "(q_proj"}, "'(q_proj' is no regular expression"),
        ({"target_modules": ["c_attn"], "modules_to_save": None}, "name nothing of this model"),
        ({"target_modules": ["q_proj", "norm"]}, "model.norm, which is no matrix"),
        (
            {"modules_to_save": ["v_proj", "_proj"]},
            "v_proj.weight (ours layers.attention.v.kernel)",
        ),
        ({"target_modules": "v_proj", "layers_to_transform": [1]}, "layers_to_transform"),
    ],
)
def test_module_names_that_cannot_be_read(adapter, changes, said):
    change, _ = adapter
    _refused(change(**changes), said)


def test_a_target_that_is_no_matrix_is_taken_out_or_saved_whole(adapter):
    change, tensors = adapter
    targets = ["q_proj", "v_proj", "norm"]
    said = "model.norm, which is no matrix; take it out, or name it in modules_to_save"
    _refused(change(target_modules=targets), said)
    read_adapter(change(target_modules=targets[:2]), MODEL)
    tensors[f"{PREFIX}model.norm.weight"] = np.full(48, 3, np.float32)
    saved = ["embed_tokens", "lm_head", "model.norm"]
    lora, overlay = read_adapter(change(target_modules=targets, modules_to_save=saved), MODEL)
    assert "final_norm" in lora.full
    np.testing.assert_array_equal(overlay["final_norm"]["scale"], 3)


def test_keys_that_a_file_contradicts_are_written_otherwise(adapter):
    change, _ = adapter
    for key, bad, good in (
        ("bias", "all", "none"),
        ("fan_in_fan_out", True, False),
        ("use_qalora", True, False),
    ):
        _refused(change(**{key: bad}), f"write {json.dumps(good)}")
        read_adapter(change(**{key: good}), MODEL)


def test_settings_that_change_nothing_are_left_alone(adapter, capsys):
    change, _ = adapter
    sound = {"init_lora_weights": "gaussian", "peft_version": "9", "task_type": None}
    sound["megatron_config"] = {"num_layers": 3}
    read_adapter(change(**sound), MODEL)
    assert "note" not in capsys.readouterr().err
    read_adapter(change(new_key={"a": 1}, other=False), MODEL)
    assert "left alone: new_key\n" in capsys.readouterr().err


def test_every_wrong_tensor_is_listed_by_both_names(adapter):
    change, tensors = adapter
    for layer in range(3):
        del tensors[f"{Q.format(layer)}.lora_B.weight"]
    tensors[f"{Q.format(1)}.lora_A.weight"] = np.zeros((4, 47), np.float32)
    tensors[f"{Q.format(0)}.lora_A.bias"] = np.zeros(4, np.float32)
    tensors[f"{HEAD}.weight"] = np.zeros((97, 48), np.int8)
    _refused(
        change(),
        f"missing: {Q.format('{0-2}')}.lora_B.weight (ours layers.attention.q.b)",
        f"misshapen: {Q.format(1)}.lora_A.weight (ours layers.attention.q.a: [4, 47], and the"
        " config makes it [4, 48])",
        f"extra: {Q.format(0)}.lora_A.bias",
        f"not weights: {HEAD}.weight (ours head.weight",
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "missing: {k}.lora_A.weight"),
        ({"target_modules": r".*\.self_attn\.(q|k|v)_proj"}, "missing: {k}.lora_A.weight"),
        ({"modules_to_save": ["embed_tokens", "lm_head", "k_proj"]}, "missing: {k}.weight"),
        (
            {
                "target_modules": ["q_proj", "v_proj", "lm_head"],
                "modules_to_save": ["embed_tokens"],
            },
            f"missing: {HEAD}.lora_A.weight",
        ),
        ({"rank_pattern": {"q_proj": 3}}, "misshapen: {q}.lora_A.weight (ours"),
        ({"exclude_modules": ["q_proj"]}, "extra: {q}.lora_A.weight"),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, "extra: "),
    ],
)
def test_config_and_tensors_must_agree(adapter, changes, said):
    change, _ = adapter
    q = Q.format("{0-2}")
    _refused(change(**changes), said.format(q=q, k=q.replace("q_proj", "k_proj")))


def test_another_base(adapter):
    change, _ = adapter
    _refused(
        change(), "misshapen", "layers.attention.q.b", model=tiny.config(num_kv_heads=2, head_dim=8)
    )
    _refused(change(), "layers.{1-2}", "extra", model=tiny.config(num_kv_heads=2, num_layers=1))


def test_a_grown_vocabulary(adapter):
    change, tensors = adapter
    tensors[f"{EMBEDDING}.weight"] = np.zeros((99, 48), np.float32)
    _refused(change(), "99 tokens", "has 97", "jllama vocabulary grow")


def test_keys_with_the_name_of_the_adapter_are_read(adapter):
    change, tensors = adapter
    wanted = read_adapter(change(), MODEL)
    tensors |= {
        re.sub(r"(lora_[AB])\.", r"\1.default.", name).replace(
            f"{HEAD}.", f"{HEAD}.modules_to_save.default."
        ): tensors.pop(name)
        for name in list(tensors)
    }
    assert f"{HEAD}.modules_to_save.default.weight" in tensors
    lora, overlay = read_adapter(change(), MODEL)
    assert lora == wanted[0]
    jax.tree.map(np.testing.assert_array_equal, overlay, wanted[1])


def test_an_empty_tensor(adapter):
    change, tensors = adapter
    tensors[f"{Q.format(0)}.lora_A.weight"] = np.zeros((0,), np.float32)
    _refused(change(), "q_proj.lora_A.weight is empty", "gathered")


def test_rank_above_the_matrix(adapter):
    change, tensors = adapter
    for layer in range(3):
        for name in ("q_proj", "v_proj"):
            at = f"{PREFIX}model.layers.{layer}.self_attn.{name}"
            outputs = 64 if name == "q_proj" else 32
            tensors[f"{at}.lora_A.weight"] = np.zeros((50, 48), np.float32)
            tensors[f"{at}.lora_B.weight"] = np.zeros((outputs, 50), np.float32)
    _refused(change(r=50), "q_proj has rank 50, above the 48", "merge_and_unload")


def test_missing_files(adapter, tmp_path):
    change, _ = adapter
    folder = change()
    (folder / WEIGHTS).unlink()
    _refused(folder, "no weights", WEIGHTS, "adapter_model.bin")
    (folder / CONFIG).unlink()
    _refused(folder, CONFIG, "no such file")


def test_a_module_of_some_layers_needs_the_base(adapter):
    change, tensors = adapter
    tensors[f"{PREFIX}model.layers.1.input_layernorm.weight"] = np.full(48, 3, np.float32)
    saved = ["embed_tokens", "lm_head", "layers.1.input_layernorm"]
    _refused(change(modules_to_save=saved), "layers.attention_norm.scale", "with its base")
    base = tiny.params(MODEL)
    lora, overlay = read_adapter(change(), MODEL, base)
    assert "attention_norm" in lora.full
    scale = overlay["layers"]["attention_norm"]["scale"]
    np.testing.assert_array_equal(scale[1], 3)
    np.testing.assert_array_equal(scale[::2], base["layers"]["attention_norm"]["scale"][::2])


def test_a_low_rank_head_is_worked_out_with_the_base(adapter):
    change, tensors = adapter
    rng = np.random.default_rng(0)
    del tensors[f"{HEAD}.weight"]
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 48), (97, 4)))
    tensors |= {f"{HEAD}.lora_A.weight": a, f"{HEAD}.lora_B.weight": b}
    saved = {"target_modules": ["q_proj", "v_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}
    _refused(change(**saved), "lm_head is worked out with the base's head.weight", "with its base")
    base = tiny.params(MODEL)
    lora, overlay = read_adapter(change(), MODEL, base)
    assert lora.full == ("embedding", "head")
    wanted = base["head"]["weight"] + 6.5 / 4 * b @ a
    np.testing.assert_allclose(overlay["head"]["weight"], wanted, rtol=1e-5, atol=1e-6)
    padded = tiny.config(num_kv_heads=2, vocab_multiple=64)
    _, overlay = read_adapter(change(), padded, tiny.params(padded))
    assert overlay["head"]["weight"].shape == (128, 48)
    assert not overlay["head"]["weight"][97:].any()


def test_tables_that_no_key_names_are_read_too(adapter):
    change, tensors = adapter  # as peft saves those of a resized vocabulary
    for tie in (False, True):
        tensors[f"{HEAD}.weight"] = tensors[f"{EMBEDDING}.weight"]
        model = dataclasses.replace(MODEL, tie_embeddings=tie)
        lora, overlay = read_adapter(change(modules_to_save=None), model)
        assert lora.full == (("embedding",) if tie else ("embedding", "head"))
        table = overlay["embedding"]["weight"]
        np.testing.assert_array_equal(table, tensors[f"{EMBEDDING}.weight"])


def test_a_matrix_low_rank_in_some_layers_and_whole_in_others(adapter):
    change, tensors = adapter
    at = "model.layers.1.self_attn.q_proj"
    for name in ("lora_A", "lora_B"):
        del tensors[f"{PREFIX}{at}.{name}.weight"]
    tensors[f"{PREFIX}{at}.weight"] = np.zeros((64, 48), np.float32)
    folder = change(modules_to_save=["embed_tokens", "lm_head", at])
    _refused(folder, "layers.0.self_attn.q_proj is low-rank", f"{at} saved whole")


def test_a_tied_embedding_and_head_must_change_alike(adapter):
    change, tensors = adapter
    tied = dataclasses.replace(MODEL, tie_embeddings=True)
    said = "the model ties them", "jllama convert BASE UNTIED --untie"
    _refused(change(), *said, model=tied)  # two tables
    tensors[f"{HEAD}.weight"] = tensors[f"{EMBEDDING}.weight"]
    lora, overlay = read_adapter(change(), tied)
    assert lora.full == ("embedding",) and "head" not in overlay
    del tensors[f"{HEAD}.weight"]
    _refused(change(modules_to_save=["embed_tokens"]), *said, model=tied)
    read_adapter(change(ensure_weight_tying=True), tied)


def test_git_lfs_pointer_is_no_adapter(adapter):
    change, _ = adapter
    folder = change()
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    _refused(folder, "git lfs pull")
