"""Random models from transformers to jllama and back: float64 is the truth, on either side.

Errors are the largest difference over the largest logit, at positions up to 2,000.
"""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

import jllama
from jllama import cli
from jllama.model.rope import inverse_frequencies
from tests.tiny import relative_error

LENGTH = 2001
POSITIONS = np.linspace(0, LENGTH - 1, 64).astype(int).tolist()
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
    "Code Llama": {**_rope(1e6), "vocab_size": 32016, "max_position_embeddings": 16384},
    "Vicuna 16K": _rope(1e4, "linear", factor=4.0),
    "Chinese-LLaMA": {"vocab_size": 49953, "hidden_size": 32},
    "Chinese-Alpaca": {"vocab_size": 49954, "hidden_size": 32},
    "Chinese-LLaMA-2": {"vocab_size": 55296, "hidden_size": 32},
    "TinyLlama": {
        "vocab_size": 32000,
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
by_case = pytest.mark.parametrize("case", NAMES)
by_reader = pytest.mark.parametrize("reader", ["transformers", "transformers4"])


def _ids(vocab_size: int) -> list[int]:
    return np.random.default_rng(0).integers(0, vocab_size, LENGTH).tolist()


@dataclasses.dataclass(frozen=True)
class Job:
    """A folder, and where a peer writes what it computes with it."""

    folder: object
    out: object
    ids: list[int]

    def json(self, **more) -> dict:
        return {**dataclasses.asdict(self), "positions": POSITIONS, **more}

    def found(self):
        """logits (float64), logits32 and inv_freq."""
        return np.load(self.out)


def _jobs(folder, which=NAMES) -> dict[str, Job]:
    cases = dict(zip(NAMES, CASES, strict=True))
    sizes = {name: {**SIZES, **VARIANTS[cases[name][0]]}["vocab_size"] for name in which}
    return {
        name: Job(folder / str(i), folder / f"{i}.npz", _ids(sizes[name]))
        for i, name in enumerate(which)
    }


def _make(run_peer, peer, folder) -> dict[str, Job]:
    jobs = _jobs(folder)
    work = [
        job.json(seed=i, make={"config": {**SIZES, **VARIANTS[variant]}, "std": std})
        for i, (job, (variant, std)) in enumerate(zip(jobs.values(), CASES, strict=True))
    ]
    run_peer(peer, "models", work, folder)
    return jobs


@pytest.fixture(scope="module", params=["transformers", "transformers4"])
def made(request, run_peer, tmp_path_factory):
    """The peer's name, and the random models that it made."""
    return request.param, _make(run_peer, request.param, tmp_path_factory.mktemp("made"))


def _convert(*args) -> None:
    assert cli.main(["convert", *map(str, args)]) == 0


def _logits(folder, ids) -> np.ndarray:
    model = jllama.load(folder, dtype="float32")
    return np.asarray(model.logits(np.array([ids]))[0, np.array(POSITIONS)])


def _check(error: float, own: float, case: str) -> None:
    """The peer's float32 is as far from float64: at least half its digits are noise of the sums."""
    assert error < (1e-5 if "std 0.02" in case else 10 * own)


@by_case
def test_jllama_reads_what_transformers_wrote(case, made, measured):
    peer, jobs = made
    job, exact = jobs[case], jobs[case].found()
    error = relative_error(_logits(job.folder, job.ids), exact["logits"])
    own = relative_error(exact["logits32"], exact["logits"])
    measured(case, f"{peer} → jllama", error, own)
    _check(error, own, case)


@by_case
def test_inverse_frequencies_of_what_transformers_wrote(case, made):
    _, jobs = made
    ours = inverse_frequencies(jllama.load(jobs[case].folder).config)
    np.testing.assert_allclose(ours, jobs[case].found()["inv_freq"], rtol=1e-6)


@pytest.fixture(scope="module")
def exported(run_peer, tmp_path_factory):
    """transformers' models through a jllama folder into Hugging Face's; where each of them lies."""
    root = tmp_path_factory.mktemp("exported")
    for name in ("source", "jllama", "hf"):
        (root / name).mkdir()
    sources = _make(run_peer, "transformers", root / "source")
    for i, source in enumerate(sources.values()):
        _convert(source.folder, root / "jllama" / str(i), "--to", "jllama")
        _convert(root / "jllama" / str(i), root / "hf" / str(i), "--to", "hf")
    return root, sources


@pytest.fixture(scope="module")
def readings(exported, run_peer, tmp_path_factory):
    """What each transformers computes with the exported folders."""
    root, _ = exported
    readings = {}
    for peer in ("transformers", "transformers4"):
        out = tmp_path_factory.mktemp(peer)
        jobs = [
            dataclasses.replace(job, out=out / job.out.name) for job in _jobs(root / "hf").values()
        ]
        run_peer(peer, "models", [job.json() for job in jobs], out)
        readings[peer] = dict(zip(NAMES, jobs, strict=True))
    return readings


@by_reader
@by_case
def test_transformers_reads_what_jllama_wrote(case, reader, exported, readings, measured):
    root, sources = exported
    exact = readings[reader][case].found()
    ours = _logits(root / "jllama" / str(NAMES.index(case)), sources[case].ids)
    error, own = (relative_error(x, exact["logits"]) for x in (ours, exact["logits32"]))
    measured(case, f"jllama → {reader}", error, own)
    _check(error, own, case)
    # Both folders are one function to the peer.
    np.testing.assert_allclose(exact["logits"], sources[case].found()["logits"], atol=1e-12)
    np.testing.assert_allclose(exact["inv_freq"], sources[case].found()["inv_freq"], rtol=1e-6)


@by_case
def test_the_way_through_jllama_keeps_every_bit(case, exported):
    _, sources = exported
    before = load_file(sources[case].folder / "model.safetensors")
    after = load_file(exported[0] / "hf" / str(NAMES.index(case)) / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], strict=True)


@by_reader
def test_transformers_reads_bfloat16_that_jllama_rounded(
    reader, exported, run_peer, measured, tmp_path
):
    case = "Llama-3.1, std 0.02"
    folder = tmp_path / "bfloat16"
    _convert(
        exported[0] / "jllama" / str(NAMES.index(case)), folder, "--to", "hf", "--dtype", "bfloat16"
    )
    job = Job(folder, tmp_path / "out.npz", exported[1][case].ids)
    run_peer(reader, "models", [job.json()], tmp_path)
    exact = job.found()
    error = relative_error(_logits(folder, job.ids), exact["logits"])
    own = relative_error(exact["logits32"], exact["logits"])
    measured(f"{case}, bfloat16 weights", f"jllama → {reader}", error, own)
    assert error < 1e-5
    assert relative_error(exact["logits"], exported[1][case].found()["logits"]) < 2e-2
