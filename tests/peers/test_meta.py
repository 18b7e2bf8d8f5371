"""Random models in Meta's layout to jllama and on to Hugging Face's.

The truth is a LLaMA over Meta's own names and order of rows, in float64: tests.peers.scripts.meta.
"""

import json

import numpy as np
import pytest

import jllama
from jllama import cli
from tests.tiny import relative_error

LENGTH = 2001
POSITIONS = np.linspace(0, LENGTH - 1, 64).astype(int).tolist()
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 16, "norm_eps": 1e-6}
GROUPED = {**PARAMS, "n_kv_heads": 2, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5}
LLAMA3 = {**GROUPED, "rope_theta": 5e5, "vocab_size": 320}
NO_SCALING = {"kind": "none"}


def _scaled(factor: float) -> dict:
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192}
    return {"kind": "llama3", "factor": factor, **bands}


# params.json, files, the axis that the embedding is cut along, and what params.json leaves out.
VARIANTS = {
    "LLaMA": (PARAMS | {"vocab_size": -1}, 1, 1, NO_SCALING),
    "LLaMA, 4 files": (PARAMS | {"vocab_size": -1}, 4, 1, NO_SCALING),
    "Llama-2, 2 files": (GROUPED | {"vocab_size": -1}, 2, 1, NO_SCALING),
    "Code Llama": (PARAMS | {"vocab_size": 320, "rope_theta": 1e6}, 1, 1, NO_SCALING),
    "Llama-3, 2 files": (LLAMA3, 2, 0, NO_SCALING),
    "Llama-3.1, 2 files": (LLAMA3 | {"use_scaled_rope": True}, 2, 0, _scaled(8.0)),
    "Llama-3.2": (LLAMA3 | {"use_scaled_rope": True}, 1, 0, _scaled(32.0)),
}
STDS = (0.02, 0.1)
CASES = {f"{name}, std {std}": (*v, std) for name, v in VARIANTS.items() for std in STDS}


@pytest.fixture(scope="module")
def made(run_peer, tmp_path_factory):
    """Folders in Meta's layout, what they compute, and what transformers does after jllama."""
    root = tmp_path_factory.mktemp("meta")
    ids = np.random.default_rng(0).integers(0, 320, LENGTH).tolist()
    jobs, hf_jobs = [], []
    for i, (params, files, axis, rope, std) in enumerate(CASES.values()):
        work = {
            "params": params,
            "vocab_size": 320,
            "std": std,
            "seed": i,
            "dtype": "float32",
            "shards": files,
            "embedding_axis": axis,
            "factor": rope.get("factor", 1.0),
        }
        where = {"ids": ids, "positions": POSITIONS}
        jobs.append({"folder": root / f"meta-{i}", "out": root / f"meta-{i}.npz"} | work | where)
        hf_jobs.append({"folder": root / f"hf-{i}", "out": root / f"hf-{i}.npz"} | where)
    run_peer("transformers", "meta", jobs, root)
    for i, (params, _, _, rope, _) in enumerate(CASES.values()):
        (root / f"{i}.yaml").write_text(json.dumps(_model(params, rope)))
        for source, target in ((f"meta-{i}", f"jllama-{i}"), (f"jllama-{i}", f"hf-{i}")):
            to = target.partition("-")[0]
            args = ["convert", str(root / source), str(root / target), "--to", to]
            named = ["--model", str(root / f"{i}.yaml")] if source.startswith("meta") else []
            assert cli.main([*args, *named]) == 0
    run_peer("transformers", "models", hf_jobs, root)
    return root, np.array([ids])


def _model(params: dict, rope: dict) -> dict:
    """The file that --model names."""
    heads = params["n_heads"]
    return {
        "vocab_size": 320,
        "hidden_dim": params["dim"],
        "num_layers": params["n_layers"],
        "num_heads": heads,
        "num_kv_heads": params.get("n_kv_heads", heads),
        "head_dim": params["dim"] // heads,
        "ffn_dim": 224 if "ffn_dim_multiplier" in params else 176,
        "max_length": 4096,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 1e4),
        "rope": rope,
        "tie_embeddings": False,
    }


@pytest.mark.parametrize("case", CASES)
def test_meta_to_jllama_to_transformers(case, made, measured):
    root, ids = made
    i = list(CASES).index(case)
    exact = np.load(root / f"meta-{i}.npz")["logits"]
    ours = jllama.load(root / f"jllama-{i}", dtype="float32").logits(ids)[0, np.array(POSITIONS)]
    hf = np.load(root / f"hf-{i}.npz")
    # Two programs over two layouts are one function in float64.
    np.testing.assert_allclose(hf["logits"], exact, rtol=0, atol=1e-11 * np.abs(exact).max())
    error, own = relative_error(ours, exact), relative_error(hf["logits32"], exact)
    measured(case, "Meta → jllama → Hugging Face", error, own)
    assert error < (1e-5 if "std 0.02" in case else 10 * own)
