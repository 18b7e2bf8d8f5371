"""Random models from transformers to jllama and back: float64 is the truth, on either side.

Errors are the largest difference over the largest logit, at positions up to 2,000.
"""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jllama
from jllama import cli
from jllama.interop import hf
from jllama.model import llama
from jllama.model.rope import inverse_frequencies
from tests.tiny import relative_error

LENGTH = 2001
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope": {"rope_type": "default", "rope_theta": 1e4},
}


def _rope(theta: float, kind: str = "default", **scaling) -> dict:
    return {"rope": {"rope_type": kind, "rope_theta": theta, **scaling}}


def _llama3(factor: float) -> dict:
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = _rope(5e5, "llama3", factor=factor, original_max_position_embeddings=8192, **bands)
    grouped = {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
    return rope | grouped


# What each published model has of its own, scaled down.
VARIANTS = {
    "LLaMA": {},
    "Llama-2 70B": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
    "Llama-3": {**_llama3(8.0), **_rope(5e5), "max_position_embeddings": 8192},
    "Llama-3.1": _llama3(8.0),
    "Llama-3.2": {**_llama3(32.0), "tie_word_embeddings": True, "head_dim": 24},
    "Code Llama": {**_rope(1e6), "vocab_size": 336, "max_position_embeddings": 16384},
    "Vicuna 16K": _rope(1e4, "linear", factor=4.0),
    "Chinese-LLaMA-2 64K": {
        **_rope(1e4, "yarn", factor=16.0, original_max_position_embeddings=128),
        "head_dim": 32,
    },
    "YaRN, own bands": _rope(
        5e5,
        "yarn",
        factor=40.0,
        original_max_position_embeddings=512,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=1.4,
        truncate=False,
    ),
    "dynamic": {**_rope(1e4, "dynamic", factor=4.0), "max_position_embeddings": 512},
    "Chinese-LLaMA": {"vocab_size": 49953, "hidden_size": 32},
    "Chinese-Alpaca": {"vocab_size": 49954, "hidden_size": 32},
    "Chinese-LLaMA-2": {"vocab_size": 55296, "hidden_size": 32},
    "TinyLlama": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
    },
}
CASES = [(variant, std) for variant in VARIANTS for std in (0.02, 0.1)]
NAMES = [f"{variant}, std {std}" for variant, std in CASES]
PEERS = ("transformers", "transformers4")
by_case = pytest.mark.parametrize("case", NAMES)
by_peer = pytest.mark.parametrize("peer", PEERS)


@dataclasses.dataclass(frozen=True)
class Job:
    """A model's folder, and the file where a peer writes its logits of `ids` at `positions`."""

    folder: Path
    out: Path
    ids: list[int]
    positions: list[int]

    def json(self, **more) -> dict:
        return {**dataclasses.asdict(self), **more}

    def found(self):
        """logits (float64), logits32 and inv_freq."""
        return np.load(self.out)


def _jobs(folders: Path, out: Path) -> dict[str, Job]:
    """One for each case."""
    jobs = {}
    for i, (name, (variant, _)) in enumerate(zip(NAMES, CASES, strict=True)):
        vocab_size = {**SIZES, **VARIANTS[variant]}["vocab_size"]
        ids = np.random.default_rng(i).integers(0, vocab_size, LENGTH).tolist()
        positions = np.linspace(0, LENGTH - 1, 64).astype(int).tolist()
        jobs[name] = Job(folders / str(i), out / f"{i}.npz", ids, positions)
    return jobs


def _convert(*args) -> None:
    assert cli.main(["convert", *map(str, args)]) == 0


def _logits(job: Job) -> np.ndarray:
    model = jllama.load(job.folder, dtype="float32")
    tokens = np.array([job.ids])
    hidden, _ = _apply(model.params, model.config, model.compute, tokens, np.arange(LENGTH)[None])
    # Those of every position would take half a gigabyte with a large vocabulary.
    return np.asarray(
        llama.logits(model.params, model.config, hidden[:, np.array(job.positions)])[0]
    )


_apply = jax.jit(llama.apply, static_argnums=(1, 2))


def _check(error: float, own: float, case: str) -> None:
    assert error < (1e-5 if "std 0.02" in case else 10 * own)


@pytest.fixture(scope="module")
def made(run_peer, tmp_path_factory):
    """Random models that each transformers made, and what it computes with them."""
    found = {}
    for peer in PEERS:
        folder = tmp_path_factory.mktemp(peer)
        found[peer] = _jobs(folder, folder)
        work = [
            job.json(seed=i, make={"config": {**SIZES, **VARIANTS[variant]}, "std": std})
            for i, (job, (variant, std)) in enumerate(zip(found[peer].values(), CASES, strict=True))
        ]
        run_peer(peer, "models", work, folder)
    return found


@pytest.fixture(scope="module")
def ours(made, tmp_path_factory):
    """transformers 5's models as jllama's folders, and what jllama computes with them."""
    folders = tmp_path_factory.mktemp("jllama")
    found = _jobs(folders, folders)
    for name, job in found.items():
        _convert(made["transformers"][name].folder, job.folder, "--to", "jllama")
        np.save(job.out.with_suffix(".npy"), _logits(job))
    return found


@pytest.fixture(scope="module")
def exported(ours, run_peer, tmp_path_factory):
    """jllama's folders as Hugging Face's, and what each transformers computes with them."""
    folders = tmp_path_factory.mktemp("hf")
    for name, job in _jobs(folders, folders).items():
        _convert(ours[name].folder, job.folder, "--to", "hf")
    found = {}
    for peer in PEERS:
        out = tmp_path_factory.mktemp(f"read-by-{peer}")
        found[peer] = _jobs(folders, out)
        run_peer(peer, "models", [job.json() for job in found[peer].values()], out)
    return found


@by_peer
@by_case
def test_jllama_reads_what_transformers_wrote(case, peer, made, measured):
    job = made[peer][case]
    exact = job.found()
    error = relative_error(_logits(job), exact["logits"])
    own = relative_error(exact["logits32"], exact["logits"])
    measured(case, f"{peer} → jllama", error, own)
    _check(error, own, case)


@by_peer
@by_case
def test_inverse_frequencies_of_what_transformers_wrote(case, peer, made):
    config, _ = hf.read_folder(made[peer][case].folder, os.listdir(made[peer][case].folder))
    exact = made[peer][case].found()["inv_freq"]
    # Of the kinds that depend on it, the length is that of the text that was read last.
    np.testing.assert_allclose(inverse_frequencies(config, LENGTH), exact, rtol=1e-6)


@by_peer
@by_case
def test_transformers_reads_what_jllama_wrote(case, peer, made, ours, exported, measured):
    exact = exported[peer][case].found()
    logits = np.load(ours[case].out.with_suffix(".npy"))
    error, own = (relative_error(x, exact["logits"]) for x in (logits, exact["logits32"]))
    measured(case, f"jllama → {peer}", error, own)
    _check(error, own, case)
    # Before and after, it is one function to the peer.
    source = made["transformers"][case].found()
    assert relative_error(exact["logits"], source["logits"]) < 1e-12
    np.testing.assert_allclose(exact["inv_freq"], source["inv_freq"], rtol=1e-6)


@by_case
def test_the_way_through_jllama_keeps_every_bit(case, made, exported):
    before, after = (
        load_file(peers["transformers"][case].folder / "model.safetensors")
        for peers in (made, exported)
    )
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], strict=True)


@by_peer
def test_transformers_reads_bfloat16_that_jllama_rounded(
    peer, made, ours, run_peer, measured, tmp_path
):
    case = "Llama-3.1, std 0.02"
    folder = tmp_path / "bfloat16"
    job = dataclasses.replace(ours[case], folder=folder, out=tmp_path / "out.npz")
    _convert(ours[case].folder, job.folder, "--to", "hf", "--dtype", "bfloat16")
    run_peer(peer, "models", [job.json()], tmp_path)
    exact = job.found()
    error = relative_error(_logits(job), exact["logits"])
    own = relative_error(exact["logits32"], exact["logits"])
    measured(f"{case}, bfloat16 weights", f"jllama → {peer}", error, own)
    assert error < 1e-5
    assert relative_error(exact["logits"], made["transformers"][case].found()["logits"]) < 2e-2
