"""Every shipped model has exactly the parameters of the published one."""

import dataclasses
import math
import re

import jax
import pytest

from jllama.config import ComputeConfig
from jllama.config import recipe as recipes
from jllama.flops import parameter_count
from jllama.model.llama import init_params

PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-34b": 33_743_970_304,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "chinese-llama-7b": 6_885_486_592,
    "chinese-alpaca-7b": 6_885_494_784,
    "chinese-llama2-7b": 6_929_256_448,
    "chinese-alpaca2-7b": 6_929_256_448,
    # A 13B has the base's and the new rows of embedding and head.
    "chinese-llama-13b": 13_015_864_320 + 2 * 17_953 * 5120,
    "chinese-alpaca-13b": 13_015_864_320 + 2 * 17_954 * 5120,
    "chinese-llama2-13b": 13_015_864_320 + 2 * 23_296 * 5120,
    "chinese-alpaca2-13b": 13_015_864_320 + 2 * 23_296 * 5120,
    "chinese-llama2-7b-16k": 6_929_256_448,
    "chinese-llama2-7b-64k": 6_929_256_448,
    "chinese-alpaca2-7b-16k": 6_929_256_448,
    "chinese-alpaca2-7b-64k": 6_929_256_448,
    "chinese-llama2-13b-16k": 13_015_864_320 + 2 * 23_296 * 5120,
    "chinese-alpaca2-13b-16k": 13_015_864_320 + 2 * 23_296 * 5120,
    "vicuna-7b-16k": 6_738_415_616,
    "vicuna-13b-16k": 13_015_864_320,
    "tinyllama-1.1b": 1_100_048_384,
    "stories-15m": 15_191_712,
    "stories-110m": 109_529_856,
}
# Facts that a parameter count does not show: (length, eps, theta).
NUMERICS = {
    "llama-7b": (2048, 1e-6, 1e4),
    "llama-65b": (2048, 1e-5, 1e4),
    "llama2-70b": (4096, 1e-5, 1e4),
    "llama3-8b": (8192, 1e-5, 5e5),
    "llama3.1-405b": (131072, 1e-5, 5e5),
    "llama3.2-1b": (131072, 1e-5, 5e5),
    "codellama-34b": (16384, 1e-5, 1e6),
    "chinese-alpaca-7b": (2048, 1e-6, 1e4),
    "chinese-llama2-7b": (4096, 1e-5, 1e4),
    "chinese-llama2-7b-16k": (16384, 1e-5, 1e4),
    "chinese-llama2-7b-64k": (65536, 1e-5, 1e4),
    "vicuna-7b-16k": (16384, 1e-5, 1e4),
}


def _shapes(model):
    return jax.eval_shape(
        lambda: init_params(model, ComputeConfig(dtype="float32"), jax.random.key(0))
    )


def _count(model) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_shapes(model)))


def test_every_shipped_model_is_checked():
    assert set(recipes.model_names()) == {*PUBLISHED, "tiny", "tiny-256"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_model_are_the_published_ones(name):
    assert _count(recipes.load_model(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_analytic_count_is_the_published_one(name):
    assert parameter_count(recipes.load_model(name)) == PUBLISHED[name]


def test_analytic_count_follows_qk_norm():
    model = dataclasses.replace(recipes.load_model("llama3.2-1b"), qk_norm=True)
    assert parameter_count(model) == _count(model) == PUBLISHED["llama3.2-1b"] + 16 * 2 * 64


@pytest.mark.parametrize("name", NUMERICS)
def test_length_epsilon_and_theta(name):
    model = recipes.load_model(name)
    assert (model.max_length, model.rms_norm_eps, model.rope_theta) == NUMERICS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_are_scaled_as_published(name):
    rope = recipes.to_dict(recipes.load_model(name).rope)
    factor = {"llama3.1": 8.0, "llama3.2": 32.0}.get(name.split("-")[0])
    if name.endswith("-16k"):
        assert rope == {"kind": "linear", "factor": 4.0}
    elif name.endswith("-64k"):
        yarn = {"kind": "yarn", "factor": 16.0, "original_length": 4096, "truncate": True}
        assert rope == yarn | {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None}
    elif factor is None:
        assert rope == {"kind": "none"}
    else:
        assert rope == {
            "kind": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_length": 8192,
        }


@pytest.mark.parametrize(
    ("recipe", "tokens", "peak", "warmup", "floor"),
    [
        ("pretrain-llama2-7b", 2e12, 3e-4, 2000, 0.1),
        ("pretrain-llama2-70b", 2e12, 1.5e-4, 2000, 0.1),
        ("pretrain-llama3-8b", 15e12, 3e-4, 8000, 0.01),
    ],
)
def test_pretraining_recipes_follow_the_papers(recipe, tokens, peak, warmup, floor):
    loaded = recipes.load(recipes.configs_folder() / "train" / f"{recipe}.yaml")
    assert recipe == f"pretrain-{loaded.run.name.removeprefix('pretrain-')}"
    training = loaded.training
    tokens_per_step = training.batch_size * loaded.data.length
    assert tokens_per_step == 4 * 2**20
    assert loaded.data.length == loaded.model.max_length
    assert training.steps * tokens_per_step == pytest.approx(tokens, rel=1e-6)
    schedule, adam = training.schedule, training.optimizer
    assert (schedule.peak, schedule.warmup_steps, schedule.floor) == (peak, warmup, floor)
    assert (adam.beta1, adam.beta2, adam.eps) == (0.9, 0.95, 1e-5)
    assert (adam.weight_decay, adam.clip_norm) == (0.1, 1.0)
    weights = {source.name: source.weight for source in loaded.data.train}
    assert weights == {
        "commoncrawl": 67.0,
        "c4": 15.0,
        "github": 4.5,
        "wikipedia": 4.5,
        "books": 4.5,
        "arxiv": 2.5,
        "stackexchange": 2.0,
    }


CODE_LLAMA = {
    # recipe: (size, tokens, peak, begins from, infills, weights)
    "codellama-7b": ("7b", 500e9, 3e-4, "models/llama2-7b-grown", True, (85, 8, 7)),
    "codellama-13b": ("13b", 500e9, 3e-4, "models/llama2-13b-grown", True, (85, 8, 7)),
    "codellama-python": ("7b", 100e9, 1e-4, "runs/codellama-7b", False, (75, 10, 10, 5)),
}


@pytest.mark.parametrize("recipe", CODE_LLAMA)
def test_code_llamas_recipes_follow_the_paper(recipe):
    size, tokens, peak, begins, infills, weights = CODE_LLAMA[recipe]
    loaded = recipes.load(recipes.configs_folder() / "train" / f"{recipe}.yaml")
    assert loaded.model == recipes.load_model(f"llama2-{size}", ["vocab_size=32016"])
    training, schedule = loaded.training, loaded.training.schedule
    tokens_per_step = training.batch_size * loaded.data.length
    assert (loaded.data.length, tokens_per_step) == (4096, 4 * 2**20)
    assert training.steps * tokens_per_step == pytest.approx(tokens, rel=1e-5)
    assert (schedule.peak, schedule.warmup_steps) == (peak, 1000)
    assert schedule.floor == pytest.approx(1 / 30)
    assert training.init_from == begins and loaded.run.name == recipe
    objective = {"kind": "infill", "rate": 0.9, "spm": 0.5} if infills else {"kind": "causal"}
    assert recipes.to_dict(loaded.data.objective) == objective
    assert tuple(source.weight for source in loaded.data.train) == weights


@pytest.mark.parametrize(("size", "steps"), [("7b", 3000), ("13b", 10_000)])
def test_the_long_context_stage_is_in_the_recipe(size, steps):
    path = recipes.configs_folder() / "train" / f"codellama-{size}.yaml"
    overrides = re.findall(r"--(\S+=\S+)", path.read_text())
    loaded = recipes.load(path, overrides)
    assert loaded.model == recipes.load_model(f"codellama-{size}")
    assert loaded.model.rope_theta == 1e6 and loaded.data.length == 16384
    assert loaded.training.batch_size * loaded.data.length == 2 * 2**20
    assert (loaded.training.steps, loaded.training.schedule.peak) == (steps, 2e-5)
    assert loaded.training.init_from == f"runs/codellama-{size}"
