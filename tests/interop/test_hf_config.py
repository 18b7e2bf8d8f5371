"""config.json is written and read back, in both schemas of RoPE; bad values are refused."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest

from jllama.config import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    NoRopeScaling,
    YarnRopeScaling,
    recipe,
)
from jllama.errors import UserError
from jllama.interop.hf_config import generation_config, read_config, write_config
from jllama.model.rope import inverse_frequencies
from tests import tiny

LLAMA1 = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALED = Llama3RopeScaling(
    kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
)
MODELS = {name: recipe.load_model(name) for name in recipe.model_names()}
MODELS |= {f"tiny {name}": tiny.config(**changes) for name, changes in tiny.VARIANTS.items()}
ORIGINAL = "original_max_position_embeddings"
UNNAMED = ("ntk", "adaptive")
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 512}


def read(**changes):
    return read_config(LLAMA1 | changes, "d/config.json")


def without(*keys):
    return read_config({k: v for k, v in LLAMA1.items() if k not in keys}, "d/config.json")


@pytest.mark.parametrize(
    "name",
    [n for n, m in MODELS.items() if not m.qk_norm and m.rope.kind not in UNNAMED],
)
def test_what_is_written_is_read_back(name):
    written = json.loads(json.dumps(write_config(MODELS[name], "bfloat16", None)))
    again = dataclasses.replace(read_config(written, "config.json"), init=MODELS[name].init)
    assert again == MODELS[name]
    # Each schema says it all: readers of 4 and of 5 see the same.
    for hidden in (["rope_parameters"], ["rope_theta", "rope_scaling"]):
        part = {k: v for k, v in written.items() if k not in hidden}
        assert read_config(part, "config.json").rope == MODELS[name].rope
        assert read_config(part, "config.json").rope_theta == MODELS[name].rope_theta


def test_a_scaling_that_transformers_lacks_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"rope\.kind=adaptive: .*linear, ntk, dynamic, yarn"):
        write_config(tiny.config(rope=tiny.ADAPTIVE1), "float32", None)


def test_static_ntk_is_written_as_a_larger_theta():
    model = tiny.config(rope=tiny.NTK)
    again = read_config(write_config(model, "float32", None), "config.json")
    assert again.rope == NoRopeScaling(kind="none")
    assert again.rope_theta == pytest.approx(1e4 * 4 ** (16 / 14), rel=1e-14)
    wanted = inverse_frequencies(model)
    np.testing.assert_allclose(inverse_frequencies(again), wanted, rtol=1e-14)


def test_every_number_of_yarn_is_written_and_read():
    rope = YarnRopeScaling(
        kind="yarn",
        factor=4.5,
        original_length=512,
        beta_fast=24.0,
        beta_slow=2.0,
        attention_factor=1.2,
        truncate=False,
    )
    model = tiny.config(rope=rope)
    written = json.loads(json.dumps(write_config(model, "bfloat16", None)))
    assert read_config(written, "config.json").rope == rope


def test_missing_keys_have_the_defaults_of_transformers():
    model = read()
    assert (model.num_kv_heads, model.head_dim, model.max_length) == (32, 128, 2048)
    assert (model.rms_norm_eps, model.rope_theta, model.tie_embeddings) == (1e-6, 1e4, False)
    assert model.rope == NoRopeScaling(kind="none")
    assert read(num_key_value_heads=None, head_dim=None, rope_scaling=None) == model


@pytest.mark.parametrize(
    ("keys", "theta", "rope"),
    [
        ({"rope_theta": 5e5}, 5e5, NoRopeScaling(kind="none")),
        ({"rope_theta": 500000, "rope_scaling": LLAMA3}, 5e5, SCALED),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, 5e5, SCALED),
        ({"rope_parameters": LLAMA3, "rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, SCALED),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e6}, 1e6, None),
        ({"rope_parameters": {}}, 1e4, None),
        ({"rope_scaling": {"type": "default"}}, 1e4, None),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}},
            1e4,
            LinearRopeScaling(kind="linear", factor=4.0),
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}},
            1e4,
            LinearRopeScaling(kind="linear", factor=4.0),
        ),
    ],
)
def test_both_rope_schemas(keys, theta, rope):
    model = read(**keys)
    assert (model.rope_theta, model.rope) == (theta, rope or NoRopeScaling(kind="none"))


def yarn(**changes):
    return YarnRopeScaling(kind="yarn", factor=4.0, original_length=512, **changes)


@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        (YARN, yarn()),
        (YARN | {"beta_fast": None, "beta_slow": None, "attention_factor": None}, yarn()),
        (YARN | {"beta_fast": 16, "attention_factor": 2}, yarn(beta_fast=16.0, attention_factor=2)),
        # DeepSeek's pair of factors, as transformers puts them together.
        (
            YARN | {"mscale": 0.5, "mscale_all_dim": 1.0},
            yarn(attention_factor=(0.05 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ),
        (YARN | {"mscale": 0.5}, yarn()),
        (YARN | {"truncate": False}, yarn(truncate=False)),
        (YARN | {"finetuned": True}, yarn()),
    ],
)
def test_yarn_is_read_as_transformers_reads_it(scaling, rope):
    for key in ("rope_scaling", "rope_parameters"):
        assert read(**{key: scaling}).rope == rope


def test_dynamic_scaling_begins_at_the_length_of_the_file():
    model = read(rope_scaling={"type": "dynamic", "factor": 4.0})
    assert model.rope == DynamicRopeScaling(kind="dynamic", factor=4.0, original_length=2048)
    assert model.max_length == 8192
    written = write_config(model, "bfloat16", None)
    assert written["max_position_embeddings"] == 2048
    assert read_config(written, "config.json").max_length == 8192


def test_vicunas_files_name_the_length_after_linear_scaling():
    linear = {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 4096}
    shipped = recipe.load_model("vicuna-7b-16k")
    model = read(**linear, max_sequence_length=16384, rms_norm_eps=1e-5)
    assert model == dataclasses.replace(shipped, init=model.init)
    # A key that transformers ignores lowers no length.
    assert read(**linear, max_sequence_length=2048).max_length == 4096
    assert read(max_position_embeddings=4096, max_sequence_length=16384).max_length == 4096


def test_linear_scaling_reaches_beyond_the_length_of_the_file_and_that_is_said(capsys):
    model = read(rope_scaling={"type": "linear", "factor": 4.0}, max_position_embeddings=4096)
    assert model.max_length == 16384
    said = "if 4096 is the length after scaling, convert the model with --max-length 4096\n"
    assert said in capsys.readouterr().err
    written = write_config(model, "bfloat16", None)
    assert written["max_position_embeddings"] == 4096
    assert read_config(written, "written.json") == model
    assert not capsys.readouterr().err  # the written file says both lengths
    odd = dataclasses.replace(model, max_length=10_001)
    assert read_config(write_config(odd, "bfloat16", None), "odd.json") == odd


@pytest.mark.parametrize(
    ("length", "scaling", "wanted"),
    [
        (65536, YARN | {"factor": 16.0, ORIGINAL: 4096}, 65536),
        (4096, YARN | {"factor": 16.0, ORIGINAL: 4096}, 65536),
        (131072, LLAMA3, 131072),
        (8192, LLAMA3, 8192),
    ],
)
def test_the_length_of_other_scalings(length, scaling, wanted):
    model = read(max_position_embeddings=length, rope_scaling=scaling)
    assert model.max_length == wanted
    assert read_config(write_config(model, "bfloat16", None), "c.json").max_length == wanted


def drop(key):
    return {k: v for k, v in LLAMA3.items() if k != key}


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model_type": "mistral"}, 'model_type is "mistral"'),
        ({"model_type": None}, "model_type is null"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"sliding_window": 1024}, "set use_sliding_window to false"),
        ({"attention_chunk_size": 4096}, "attention_chunk_size"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"is_causal": False}, "is_causal"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": "4096"}, 'hidden_size is "4096"'),
        ({"hidden_size": True}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": 10**30}, "vocab_size is 1000"),
        ({"head_dim": 10**20}, "head_dim is 1000"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rope_theta": 10**4000}, "rope_theta is 1000"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "rope_scaling.factor is 1000"),
        ({"rope_scaling": False}, "rope_scaling is false"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": None}, "rms_norm_eps is null"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({"head_dim": 33}, "head_dim=33"),
        ({"hidden_size": 4100}, "hidden_size is 4100"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear"'),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type is missing"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, 'rope_type "llama3"'),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor is 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 1e9}}, "rope_scaling.factor is 1000000000"),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta above 1"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor is missing"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2},
            "head_dim of at least 4",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, ORIGINAL: 1024}},
            "differs from max_position_embeddings",
        ),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling.factor is 0.5"),
        ({"rope_scaling": YARN | {"factor": 2.0}}, "max_position_embeddings=2048"),
        ({"rope_scaling": YARN, ORIGINAL: 1024}, "differs"),
        ({"rope_scaling": YARN | {"beta_fast": 1.0}}, "rope_scaling.beta_fast"),
        ({"rope_scaling": YARN | {"attention_factor": -1}}, "attention_factor is -1"),
        ({"rope_scaling": YARN | {"mscale": "1"}}, 'rope_scaling.mscale is "1"'),
        ({"rope_scaling": LLAMA3 | {ORIGINAL: 10**9}}, f"rope_scaling.{ORIGINAL} is 1000000000"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "rope_scaling.beta is 1"),
        ({"rope_scaling": YARN | {"truncate": "no"}}, 'truncate is "no"'),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"rope_type": 5}}, "rope_parameters.rope_type is 5"),
        ({"rope_parameters": {"rope_type": "new"}}, '"new"'),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        *[({"rope_scaling": drop(key)}, f"rope_scaling.{key}") for key in list(LLAMA3)[1:]],
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "another RoPE"),
        ({"rope_theta": 1e4, "rope_parameters": LLAMA3}, "another RoPE"),
        ({"rope_theta": 1e4, "rope_scaling": LLAMA3 | {"rope_theta": 5e5}}, "differs"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096}, "differs"),
    ],
)
def test_a_bad_value_is_one_line_with_file_and_key(keys, named):
    with pytest.raises(UserError) as e:
        read(**keys)
    assert str(e.value).startswith("d/config.json: ")
    assert named in str(e.value)
    assert "\n" not in str(e.value)


CORRECT_ONE = [
    ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": LLAMA3},
    ]),
    ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, [
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}},
    ]),
    ({"rope_theta": 1e4, "rope_scaling": LLAMA3 | {"rope_theta": 5e5}}, [
        {"rope_theta": 1e4, "rope_scaling": LLAMA3 | {"rope_theta": 1e4}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_theta": 5e5}},
    ]),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0, ORIGINAL: 1024}}, [
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, ORIGINAL: 2048}},
        {
            "rope_scaling": {"type": "dynamic", "factor": 2.0, ORIGINAL: 1024},
            "max_position_embeddings": 1024,
        },
    ]),
    ({"rope_scaling": YARN, ORIGINAL: 1024}, [
        {"rope_scaling": YARN, ORIGINAL: 512},
        {"rope_scaling": YARN | {ORIGINAL: 1024}, ORIGINAL: 1024},
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "corrected"), CORRECT_ONE)
def test_of_two_keys_that_differ_either_is_corrected(keys, corrected):
    with pytest.raises(UserError, match=r"; correct one$"):
        read(**keys)
    for sound in corrected:
        read(**sound)


def test_the_ways_out_of_keys_that_cannot_be_expressed():
    for bad, said, good in (
        ({"attention_bias": True}, "write false", {"attention_bias": False}),
        ({"hidden_act": "gelu"}, 'write "silu"', {"hidden_act": "silu"}),
        (
            {"sliding_window": 1024},
            "set use_sliding_window to false",
            {"sliding_window": 1024, "use_sliding_window": False},
        ),
        ({"per_layer_config": {"0": {}}}, "take the key out", {}),
        (
            {"rope_scaling": YARN | {"factor": 2.0}},
            "raise the factor, or correct the original length",
            {"rope_scaling": YARN | {"factor": 2.0, ORIGINAL: 1024}},
        ),
    ):
        with pytest.raises(UserError, match=said):
            read(**bad)
        read(**good)


@pytest.mark.parametrize("key", [key for key in LLAMA1 if key != "model_type"])
def test_the_sizes_are_required(key):
    with pytest.raises(UserError, match=f"^d/config.json: {key} is missing$"):
        without(key)


def test_keys_that_do_not_change_the_function_are_ignored():
    keys = {"pretraining_tp": 2, "attention_dropout": 0.1, "use_cache": False, "my_key": [1]}
    neutral = {"attention_bias": False, "quantization_config": None, "hidden_act": "silu"}
    layers = {"layer_types": ["full_attention"] * 32, "partial_rotary_factor": 1.0}
    assert read(**keys, **neutral, **layers) == read()


def test_a_window_that_never_cuts_and_code_that_is_not_run_change_nothing(capsys):
    assert read(sliding_window=2048) == read()
    assert read(sliding_window=100, use_sliding_window=False) == read()
    assert not capsys.readouterr().err
    assert read(auto_map={"AutoModelForCausalLM": "m.M"}) == read()
    assert "the code that auto_map names is not run" in capsys.readouterr().err


def test_keys_that_are_unknown_here_are_said_once(capsys):
    assert read(residual_scale=2.0, attention_sinks=4, spare=None) == read()
    said = capsys.readouterr().err
    assert said.endswith("unknown here have no effect: attention_sinks, residual_scale\n")
    read(residual_scale=2.0, attention_sinks=4, spare=None)
    assert not capsys.readouterr().err
    written = write_config(read(), "bfloat16", None)
    assert read_config(written, "w.json") == read()
    assert not capsys.readouterr().err  # of ours all are known


def test_a_model_that_hugging_face_cannot_express_is_not_written():
    for changes in ({"qk_norm": True}, {"hidden_dim": 50}):
        with pytest.raises(UserError, match=next(iter(changes))):
            write_config(tiny.config(**changes), "float32", None)


def test_bos_and_eos_come_from_the_tokenizer():
    one = types.SimpleNamespace(bos_id=1, eos_id=2, stop_ids=frozenset({2}))
    many = types.SimpleNamespace(bos_id=7, eos_id=9, stop_ids=frozenset({9, 8}))
    assert generation_config(one) == {"bos_token_id": 1, "eos_token_id": 2}
    assert generation_config(many) == {"bos_token_id": 7, "eos_token_id": [8, 9]}
    assert generation_config(None) == {}
    written = write_config(tiny.config(), "float16", many)
    assert (written["bos_token_id"], written["eos_token_id"]) == (7, [8, 9])
    assert written["torch_dtype"] == written["dtype"] == "float16"
    assert write_config(tiny.config(), "float16", None)["eos_token_id"] is None
