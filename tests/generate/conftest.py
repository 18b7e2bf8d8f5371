"""sample.py in this process, on the model of the module that asks for it."""

import importlib.util
from pathlib import Path

import pytest

import jllama

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def sample(monkeypatch, model):
    spec = importlib.util.spec_from_file_location("sample", ROOT / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(jllama, "load", lambda path, **options: model, raising=False)
    return lambda *args: module.main(["--model", "x", "--max-new-tokens=6", *args])
