"""The benchmark of the train step, on a tiny model."""

import functools
import importlib
import json
import sys
from pathlib import Path

import jax
import pytest
import tiny

from jllama.config import recipe
from jllama.flops import train_flops_per_token
from jllama.parallel.mesh import make_mesh


def test_it_prints_its_figures_as_json(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    benchmark = importlib.import_module("benchmarks.train_step")
    one = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(benchmark, "make_mesh", one)
    monkeypatch.setattr(benchmark, "measured_matmul_flops", lambda dtype: 4e9)
    model = tiny.config(num_layers=1)
    path = tmp_path / "model.yaml"
    path.write_text(recipe.to_yaml(model))
    args = f"--model {path} --batch 2 --length 16 --dtype float32 --steps 3 --json"
    monkeypatch.setattr(sys, "argv", ["train_step", *args.split()])
    assert benchmark.main() == 0
    figures = json.loads(capsys.readouterr().out)
    seconds = figures["seconds_per_step"]
    assert 0 < figures["seconds_per_step_min"] <= seconds
    flops = train_flops_per_token(model, 16) * 2 * 16
    assert figures["gflops_per_second"] == pytest.approx(flops / seconds / 1e9, rel=1e-3)
    assert figures["matmul_peak_gflops_per_second"] == 4.0
    assert figures["fraction_of_peak"] == pytest.approx(figures["gflops_per_second"] / 4, rel=1e-3)
