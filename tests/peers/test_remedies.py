"""What an error tells a user to do with peft or torch: refused before, right after."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import jllama
from jllama.adapt.merge import merge_overlay
from jllama.errors import UserError
from jllama.interop.peft import read_adapter
from jllama.interop.pth import read_pth
from tests.peers.test_peft import UNTIED
from tests.tiny import relative_error

FIXTURES = Path(__file__).parent.parent / "fixtures"
LENGTH = 120
POSITIONS = np.linspace(0, LENGTH - 1, 24).astype(int).tolist()
TWO = {"target_modules": ["q_proj", "v_proj"]}
MERGE = "merge_and_unload"
CONVERT = "path_initial_model_for_weight_conversion"
BLOCKS = {"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}
# What to do, the config of peft, and what the error says.
ADAPTERS = {
    "IA3": ("merge", {"peft_type": "IA3"}, MERGE),
    "LoHa": ("merge", {"peft_type": "LOHA", **TWO}, MERGE),
    "trainable tokens": ("merge", {**TWO, "trainable_token_indices": [3, 7]}, MERGE),
    "parameters": ("merge", {**TWO, "target_parameters": ["mlp.down_proj.weight"]}, MERGE),
    "KaSA": ("merge", {**TWO, "kasa_config": {}}, MERGE),
    "MonteCLoRA": ("merge", {**TWO, "monteclora_config": {}}, MERGE),
    "blocks": ("merge", {**TWO, "use_bdlora": BLOCKS}, MERGE),
    "rank above the size": ("merge", {**TWO, "r": 100}, MERGE),
    "low-rank and whole": (
        "merge",
        {
            "target_modules": r".*\.(0|2)\.self_attn\.q_proj",
            "modules_to_save": ["layers.1.self_attn.q_proj"],
        },
        MERGE,
    ),
    "PiSSA, merged": ("merge", {**TWO, "init_lora_weights": "pissa"}, MERGE),
    "PiSSA": ("convert", {**TWO, "init_lora_weights": "pissa"}, CONVERT),
    "PiSSA, patterns": (
        "convert",
        {**TWO, "init_lora_weights": "pissa_niter_4", "rank_pattern": {"q_proj": 3}},
        CONVERT,
    ),
    "OLoRA, rsLoRA": (
        "convert",
        {**TWO, "init_lora_weights": "olora", "use_rslora": True},
        CONVERT,
    ),
    "layer_replication": (
        "repeat",
        {**TWO, "layer_replication": [[0, 2], [1, 3]]},
        "write null, and read it with a base whose layers are so repeated",
    ),
    "QALoRA": (
        "read",
        {**TWO, "use_qalora": True},
        "if the file's lora_A are as wide as their matrices, write false",
    ),
    "biases": ("read", {**TWO, "bias": "all"}, 'no tensor named bias, write "none"'),
}
# What a user writes into adapter_config.json in their place.
CORRECTED = {"layer_replication": None, "use_qalora": False, "bias": "none"}


@pytest.fixture(scope="module")
def made(run_peer, tmp_path_factory):
    """The jobs of tests/peers/scripts/remedies.py, done."""
    jobs = {}
    for i, (name, (do, arguments, _)) in enumerate(ADAPTERS.items()):
        folder = tmp_path_factory.mktemp("remedy")
        ids = np.random.default_rng(i).integers(0, UNTIED["vocab_size"], LENGTH).tolist()
        at = {key: folder / key for key in ("base", "adapter", "to")} | {"out": folder / "out.npz"}
        row = {"ids": ids, "positions": POSITIONS}
        jobs[name] = {"do": do, "make": arguments, "config": UNTIED, "seed": i} | at | row
    run_peer("transformers", "remedies", list(jobs.values()), tmp_path_factory.mktemp("jobs"))
    return jobs


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_refused_is_right_as_the_error_says(name, made):
    do, _, said = ADAPTERS[name]
    job = made[name]
    base = jllama.load(job["base"], dtype="float32")
    with pytest.raises(UserError) as e:
        read_adapter(job["adapter"], base.config, base.params)
    assert said in str(e.value)
    match do:
        case "merge":
            model = jllama.load(job["to"], dtype="float32")
        case "convert":
            model = _adapted(base, job["to"])
        case "repeat":
            model = _adapted(jllama.load(job["to"], dtype="float32"), _corrected(job["adapter"]))
        case "read":
            model = _adapted(base, _corrected(job["adapter"]))
    peer = np.load(job["out"])["logits"]
    row = np.array([job["ids"]])
    assert relative_error(model.logits(row)[0, np.array(POSITIONS)], peer) < 1e-5
    assert relative_error(base.logits(row)[0, np.array(POSITIONS)], peer) > 1e-3


def _adapted(base, adapter):
    lora, overlay = read_adapter(adapter, base.config, base.params)
    params, _ = merge_overlay(lora, base.params, overlay)
    return dataclasses.replace(base, params=params)


def _corrected(adapter):
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {k: v for k, v in CORRECTED.items() if config[k]}))
    return adapter


@pytest.mark.parametrize("key", ["lora_bias", "alora_invocation_tokens"])
def test_peft_itself_cannot_merge_what_is_refused_without_another_way(key, run_peer, tmp_path):
    value = True if key == "lora_bias" else [3, 4]
    job = {"do": "merge", "make": {**TWO, key: value}, "config": UNTIED, "seed": 0, "ids": [1]}
    at = {k: tmp_path / k for k in ("base", "adapter", "to", "out")}
    with pytest.raises(AssertionError, match=r"Impossible to merge|does not support merging"):
        run_peer("transformers", "remedies", [job | at | {"positions": [0]}], tmp_path)
    base = jllama.load(tmp_path / "base", dtype="float32")
    with pytest.raises(UserError, match=key) as e:
        read_adapter(tmp_path / "adapter", base.config, base.params)
    assert MERGE not in str(e.value)


@pytest.mark.parametrize(
    ("name", "said"), [("legacy", "torch.save"), ("strided", r"\.contiguous\(\)")]
)
def test_a_file_of_torch_is_saved_again(name, said, run_peer, tmp_path):
    file = FIXTURES / "pth" / f"{name}.pth"
    with pytest.raises(UserError, match=said):
        read_pth(file)
    again = tmp_path / "again.pth"
    run_peer(
        "transformers", "remedies", [{"do": "save_again", "file": file, "to": again}], tmp_path
    )
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = read_pth(again)
    np.testing.assert_array_equal(found["a"].read(), a)
    if name == "strided":
        np.testing.assert_array_equal(found["transposed"].read(), a.T)
