"""Tests run on CPU: eight virtual devices for meshes, of which a test without a mesh uses one."""

import os
import signal
from pathlib import Path

# The environment, and not jax.config, for what programs started by a test should share.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Programs for CPUs compile in half the time without LLVM's optimisations. An XLA_FLAGS that is
    # set stays, an empty one too: `make` runs the tests marked `optimized` and the peers with them.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from jllama import progress  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

# `make test-peers` says where the peers are.
collect_ignore = [] if "JLLAMA_PEER_TRANSFORMERS" in os.environ else ["peers"]

# Derandomised: a failure is seen again by whoever runs the tests next.
hypothesis.settings.register_profile("jllama", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("jllama")


@pytest.fixture(autouse=True, scope="session")
def heard_signals():
    """Hears what nohup, or a shell's &, has told the tests and their programs to ignore."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def notes_again():
    """Lets each test hear a note, which a process says once."""
    progress.note.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Forgets what was compiled before a process has as many memory maps as Linux allows.

    Each program for CPUs has some; where there is no room for more, the compiler crashes.
    """
    yield
    maps, most = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if maps.exists() and maps.read_bytes().count(b"\n") > int(most.read_text()) // 3:
        jax.clear_caches()


@pytest.fixture
def no_cache():
    """Compiles anew: what was compiled for chips that are not there cannot be read back."""
    was = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", was)
