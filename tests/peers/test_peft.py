"""Random adapters of every kind from peft to jllama and back: float64 is the truth, on either side.

Errors are the largest difference over the largest logit, at positions up to 600.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jllama
from jllama.adapt.lora import attach
from jllama.adapt.merge import merge_overlay
from jllama.interop.peft import read_adapter
from jllama.interop.peft_write import write_adapter
from jllama.model import llama
from tests.tiny import relative_error

LENGTH = 601
POSITIONS = np.linspace(0, LENGTH - 1, 48).astype(int).tolist()
UNTIED = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope": {"rope_type": "default", "rope_theta": 5e5},
}
TIED = UNTIED | {"tie_word_embeddings": True, "head_dim": 24}
BASES = {"untied": UNTIED, "tied": TIED}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 3, r".*\.mlp\.\w+": 5, "o_proj": 12},
    "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 7, "down_proj": 30.5},
}
ADAPTERS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all seven": {"target_modules": SEVEN, "lora_dropout": 0.1},
    "rank and alpha patterns": {"target_modules": SEVEN, **PATTERNS},
    "rsLoRA, patterns": {"target_modules": "all-linear", "use_rslora": True, **PATTERNS},
    "DoRA, patterns": {"target_modules": SEVEN, "use_dora": True, **PATTERNS},
    "layers_to_transform": {
        "target_modules": ["q_proj", "mlp.down_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
        "rank_pattern": {"layers.2.self_attn.q_proj": 9},
    },
    "DoRA in one layer": {
        "target_modules": ["v_proj", "up_proj"],
        "use_dora": True,
        "layers_to_transform": 1,
    },
    "regular expression, exclude_modules": {
        "target_modules": r".*\.(0|2)\.(self_attn\.(q|o)_proj|mlp\.down_proj)",
        "exclude_modules": ["model.layers.2.self_attn.q_proj"],
    },
    "embedding and head whole": {
        "target_modules": SEVEN,
        "lora_alpha": 32,
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "norms and a matrix whole": {
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["norm", "o_proj"],
    },
    "one layer's MLP whole": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["layers.1.mlp"],
    },
    "low-rank embedding and head": {
        "target_modules": ["k_proj", "embed_tokens", "lm_head"],
        "rank_pattern": {"lm_head": 5},
        "use_rslora": True,
    },
    "low-rank embedding and head, DoRA": {
        "target_modules": ["k_proj", "embed_tokens", "lm_head"],
        "use_dora": True,
    },
    "tied, embedding whole": {
        "target_modules": SEVEN,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tied, low-rank embedding": {
        "target_modules": ["o_proj", "embed_tokens"],
        "ensure_weight_tying": True,
    },
}
# Those that an overlay has in another form: worked out, or of more layers.
OTHER_FORM = {"DoRA in one layer", "one layer's MLP whole", "tied, low-rank embedding"} | {
    name for name in ADAPTERS if name.startswith("low-rank")
}
# peft adds the change to the one table of a tied embedding and head twice when it merges.
MERGED_TWICE = {"tied, low-rank embedding"}
by_adapter = pytest.mark.parametrize("name", ADAPTERS)


@dataclasses.dataclass(frozen=True)
class Job:
    """See tests/peers/scripts/adapters.py."""

    base: Path
    adapter: Path
    out: Path
    ids: list[int]
    positions: list[int]
    merged_to: Path | None = None

    def found(self):
        return np.load(self.out)


@pytest.fixture(scope="module")
def made(run_peer, tmp_path_factory):
    """What peft made, and what it computes with it."""
    folder = tmp_path_factory.mktemp("peft")
    jobs, work, known = {}, [], set()
    for i, (name, arguments) in enumerate(ADAPTERS.items()):
        kind = "tied" if name.startswith("tied") else "untied"
        ids = np.random.default_rng(i).integers(0, UNTIED["vocab_size"], LENGTH).tolist()
        at = [folder / kind, folder / str(i), folder / f"{i}.npz"]
        jobs[name] = job = Job(*at, ids, POSITIONS, folder / f"merged{i}")
        more = {} if kind in known else {"config": BASES[kind], "std": 0.1}
        known.add(kind)
        work.append(dataclasses.asdict(job) | more | {"seed": i, "make": arguments})
    run_peer("transformers", "adapters", work, folder)
    return jobs


@pytest.fixture(scope="module")
def ours(made):
    """Each adapter with its base: model, config of the overlay, overlay."""
    bases = {job.base: jllama.load(job.base, dtype="float32") for job in made.values()}
    return {
        name: (base := bases[job.base], *read_adapter(job.adapter, base.config, base.params))
        for name, job in made.items()
    }


@pytest.fixture(scope="module")
def exported(ours, made, run_peer, tmp_path_factory):
    """jllama's adapters, and what peft computes with them."""
    folder = tmp_path_factory.mktemp("jllama")
    jobs = {}
    for i, (name, (model, lora, overlay)) in enumerate(ours.items()):
        write_adapter(folder / str(i), model.config, lora, overlay, str(made[name].base))
        jobs[name] = dataclasses.replace(
            made[name], adapter=folder / str(i), out=folder / f"{i}.npz", merged_to=None
        )
    run_peer("transformers", "adapters", [dataclasses.asdict(job) for job in jobs.values()], folder)
    return jobs


_apply = jax.jit(llama.apply, static_argnums=(1, 2))


def _logits(model, params, job, lora=None):
    tokens, positions = np.array([job.ids]), np.arange(LENGTH)[None]
    hidden, _ = _apply(params, model.config, model.compute, tokens, positions, lora=lora)
    return llama.logits(params, model.config, hidden[:, np.array(job.positions)])[0]


@by_adapter
def test_jllama_computes_what_peft_computes(name, made, ours, measured):
    model, lora, overlay = ours[name]
    job = made[name]
    exact = job.found()
    params, collection = attach(lora, model.params, overlay)
    forms = {
        "attached": _logits(model, params, job, collection),
        "merged": _logits(model, merge_overlay(lora, model.params, overlay)[0], job),
    }
    own = relative_error(exact["logits32"], exact["logits"])
    for form, logits in forms.items():
        error = relative_error(logits, exact["logits"])
        measured(name, f"peft → jllama, {form}", error, own)
        assert error < 1e-5
    without = relative_error(_logits(model, model.params, job), exact["logits"])
    assert without > 1e-2, "the adapter changes nothing"
    twice = relative_error(exact["merged"], exact["logits"])
    assert (twice > 1e-2) if name in MERGED_TWICE else (twice < 1e-10)


@by_adapter
def test_the_merged_model_is_that_of_peft(name, made, ours):
    if name in MERGED_TWICE:
        pytest.skip("peft adds the change of the tied table twice")
    model, lora, overlay = ours[name]
    merged, _ = merge_overlay(lora, model.params, overlay)
    peer = jllama.load(made[name].merged_to, dtype="float32").params
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(peer), strict=True):
        assert relative_error(a, b) < 1e-6


@by_adapter
def test_peft_computes_with_what_jllama_wrote(name, made, exported, measured):
    exact = exported[name].found()
    error = relative_error(exact["logits"], made[name].found()["logits"])
    measured(name, "peft → jllama → peft", error)
    # Float32 holds what was worked out; all else is the same numbers.
    assert error < (1e-6 if name in OTHER_FORM else 1e-12)


@by_adapter
def test_the_way_through_jllama_keeps_every_bit(name, made, exported):
    if name in OTHER_FORM:
        pytest.skip("an overlay has it in another form")
    before, after = (
        load_file(jobs[name].adapter / "adapter_model.safetensors") for jobs in (made, exported)
    )
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], strict=True)
