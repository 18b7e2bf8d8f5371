"""JAX_PLATFORMS that JAX cannot satisfy: one line, from every program."""

import os
import subprocess
import sys

import pytest

from jllama import platforms
from jllama.cli import exit_status

CODE = "import jax, sys; from jllama.cli import exit_status; sys.exit(exit_status(jax.devices))"
REFUSED = "Unable to initialize backend 'tpu': INTERNAL: no chip\n(set JAX_PLATFORMS='')"


@pytest.mark.parametrize(
    ("name", "said"),
    [("cuda", "'.[cuda]'"), ("tpu", "'.[tpu]'"), ("nowhere", "set cpu, cuda or tpu")],
)
def test_a_platform_that_is_not_installed_is_one_line(name, said):
    if {"cuda": platforms.has_cuda, "tpu": platforms.has_tpu}.get(name, bool)():
        pytest.skip(f"{name} is installed")
    env = os.environ | {"JAX_PLATFORMS": name}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert line.startswith(f"error: JAX_PLATFORMS={name}: ") and said in line
    assert "Traceback" not in done.stderr


def test_a_plugin_without_its_device_gives_jaxs_reason(monkeypatch, capsys):
    def fail():
        raise RuntimeError(REFUSED)

    monkeypatch.setattr(platforms, "has_tpu", lambda: True)
    for asked, where in (("tpu", "JAX_PLATFORMS=tpu"), ("", "JAX")):
        monkeypatch.setenv("JAX_PLATFORMS", asked)
        assert exit_status(fail) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {where}: Unable") and "no chip" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("a bug")], ids=repr)
def test_a_bug_keeps_its_traceback(error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        exit_status(fail)
