"""What a compiler says, and how its process ends."""

import os

import pytest
import recipes

from jllama.errors import UserError
from jllama.plan import process
from jllama.plan.process import CompileFailed
from jllama.plan.step import out_of_memory
from jllama.plan.topology import parse

EARLY = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries"
    " (16.16G) exceeds available HBM (15.75G)."
)
LATE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space \
hbm.
Used 20.17G of 15.75G hbm. Exceeded hbm capacity by 4.42G.

Total hbm usage >= 20.68G:
    reserved        530.00M
"""


def test_both_forms_of_the_compilers_out_of_memory_are_read():
    early, late = out_of_memory(EARLY), out_of_memory(LATE)
    assert early["bytes"] == round(16.16 * 2**30)
    assert late["bytes"] == round(20.17 * 2**30)
    assert early["capacity"] == late["capacity"] == round(15.75 * 2**30)
    assert "exceeds available HBM" in early["message"]


@pytest.mark.parametrize(
    "message",
    [
        "INTERNAL: Mosaic failed to compile TPU kernel: Used too much",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.",
        "RESOURCE_EXHAUSTED: allocation limit",
    ],
)
def test_any_other_failure_is_no_out_of_memory(message):
    assert out_of_memory(message) is None


def fake(monkeypatch, tmp_path, body):
    """Makes `body` the program that compiles."""
    (tmp_path / "fake_step.py").write_text("import os, sys, json\nsys.stdin.read()\n" + body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(process, "_PROGRAM", "fake_step")
    library = tmp_path / "libtpu.so"
    library.touch()
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(library))
    return process.compile_step(recipes.in_memory(), parse("v5e:2x2"))


def test_a_compiler_that_crashes_is_one_line(monkeypatch, tmp_path):
    body = "print('F0000 check failed: no such chip', file=sys.stderr, flush=True); os.abort()"
    with pytest.raises(CompileFailed, match=r"SIGABRT: F0000 check failed: no such chip$"):
        fake(monkeypatch, tmp_path, body)


def test_a_failure_is_reported_as_itself(monkeypatch, tmp_path):
    body = "print(json.dumps({'failure': 'JaxRuntimeError: INTERNAL: bad kernel\\n at 0x0'}))"
    with pytest.raises(CompileFailed, match=r"^JaxRuntimeError: INTERNAL: bad kernel$"):
        fake(monkeypatch, tmp_path, body)


def test_the_recipes_own_errors_stay_the_users(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"^mesh: no$"):
        fake(monkeypatch, tmp_path, "print(json.dumps({'user_error': 'mesh: no'}))")


def test_the_compilers_environment_stays_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_this_process=1")
    debugging = ("JAX_DISABLE_JIT", "JAX_DEBUG_NANS")
    for name in debugging:
        monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    body = "print(json.dumps(dict(os.environ)))"
    seen = fake(monkeypatch, tmp_path, body)
    assert seen["JAX_PLATFORMS"] == "cpu" and not {"XLA_FLAGS", *debugging} & seen.keys()
    assert seen["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    changed = {k for k in os.environ if os.environ[k] != before.get(k)}
    assert changed <= {"PYTHONPATH", "TPU_LIBRARY_PATH"}, "set by this test itself"


def test_noise_on_stdout_is_a_failure_and_not_a_report(monkeypatch, tmp_path):
    with pytest.raises(CompileFailed, match="status 0"):
        fake(monkeypatch, tmp_path, "print('hello')")


def test_a_library_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/nowhere/libtpu.so")
    with pytest.raises(UserError, match="TPU_LIBRARY_PATH=/nowhere"):
        process.find_libtpu()


def test_without_the_compiler_the_line_says_how_to_install_it(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(process.sys, "prefix", "/nowhere")
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        process.find_libtpu()
    monkeypatch.setattr(process, "has_cuda", lambda: False)
    with pytest.raises(UserError, match="cuda"):
        process.environment(parse("gpu:h100:8"))


def test_reports_are_json(monkeypatch, tmp_path):
    assert fake(monkeypatch, tmp_path, "print(json.dumps({'fits': True}))") == {"fits": True}
