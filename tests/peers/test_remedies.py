"""What an error tells a user to do with peft or torch: refused before, right after."""

import dataclasses
import json
import re
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

PTH = Path(__file__).parent.parent / "fixtures" / "pth"
LENGTH = 120
POSITIONS = np.linspace(0, LENGTH - 1, 24).astype(int).tolist()
TWO = {"target_modules": ["q_proj", "v_proj"]}
MERGE = "merge_and_unload"
CONVERT = "path_initial_model_for_weight_conversion"
BLOCKS = {"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}
LORA_GA = {**TWO, "init_lora_weights": "lora_ga", "lora_ga_config": {}}
THERE = "where it was trained, .*"
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
    "PiSSA": ("merge", {**TWO, "init_lora_weights": "pissa"}, MERGE),
    "OLoRA": ("merge", {**TWO, "init_lora_weights": "olora"}, MERGE),
    "PiSSA of random numbers": (
        "merge_live",
        {**TWO, "init_lora_weights": "pissa_niter_4"},
        THERE + MERGE,
    ),
    "LoRA-GA": ("merge_live", LORA_GA, THERE + MERGE),
    "PiSSA, converted": ("convert", {**TWO, "init_lora_weights": "pissa"}, CONVERT),
    "OLoRA, rsLoRA, converted": (
        "convert",
        {**TWO, "init_lora_weights": "olora", "use_rslora": True},
        CONVERT,
    ),
    "PiSSA of random numbers, patterns, converted": (
        "convert",
        {**TWO, "init_lora_weights": "pissa_niter_4", "rank_pattern": {"q_proj": 3}},
        THERE + CONVERT,
    ),
    "LoRA-GA, converted": ("convert", LORA_GA, THERE + CONVERT),
    "layer_replication": (
        "repeat",
        {**TWO, "layer_replication": [[0, 2], [1, 3]]},
        "in a copy of it write null, and read that over a base whose layers are so repeated",
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


# What peft cannot merge, of which no error says so.
UNMERGED = {
    "lora_bias": ("merge", {**TWO, "lora_bias": True}),
    "alora_invocation_tokens": ("merge", {**TWO, "alora_invocation_tokens": [3, 4]}),
}
# Files of torch that are refused, with what the error says.
FILES = {"legacy": r"torch\.save", "strided": r"\.contiguous\(\)"}


@pytest.fixture(scope="module")
def made(run_peer, tmp_path_factory):
    """The jobs of tests/peers/scripts/remedies.py by name, done."""
    jobs = {}
    for i, (name, (do, arguments, *_)) in enumerate((ADAPTERS | UNMERGED).items()):
        folder = tmp_path_factory.mktemp("remedy")
        ids = np.random.default_rng(i).integers(0, UNTIED["vocab_size"], LENGTH).tolist()
        at = {key: folder / key for key in ("base", "adapter", "to", "error")}
        row = {"ids": ids, "positions": POSITIONS, "out": folder / "out.npz"}
        jobs[name] = {"do": do, "make": arguments, "config": UNTIED, "seed": i} | at | row
    for name in FILES:
        to = tmp_path_factory.mktemp("remedy") / "again.pth"
        jobs[name] = {"do": "save_again", "file": PTH / f"{name}.pth", "to": to}
    run_peer("transformers", "remedies", list(jobs.values()), tmp_path_factory.mktemp("jobs"))
    return jobs


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_refused_is_right_as_the_error_says(name, made):
    do, _, said = ADAPTERS[name]
    job = made[name]
    assert not job["error"].exists(), job["error"].read_text()
    base = jllama.load(job["base"], dtype="float32")
    with pytest.raises(UserError, match=said):
        read_adapter(job["adapter"], base.config, base.params)
    match do:
        case "merge" | "merge_live":
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


@pytest.mark.parametrize("name", UNMERGED)
def test_peft_itself_cannot_merge_what_is_refused_without_that_advice(name, made):
    job = made[name]
    said = job["error"].read_text()
    assert re.match(r"RuntimeError: Impossible to merge|NotImplementedError: .* merging", said)
    base = jllama.load(job["base"], dtype="float32")
    with pytest.raises(UserError, match=name) as e:
        read_adapter(job["adapter"], base.config, base.params)
    assert MERGE not in str(e.value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_torch_is_saved_again(name, made):
    with pytest.raises(UserError, match=FILES[name]):
        read_pth(made[name]["file"])
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = read_pth(made[name]["to"])
    np.testing.assert_array_equal(found["a"].read(), a)
    if name == "strided":
        np.testing.assert_array_equal(found["transposed"].read(), a.T)
