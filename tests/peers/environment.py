"""A peer's own Python environment, made when it is first asked for; prints its interpreter.

    python tests/peers/environment.py transformers

Environments lie in ${XDG_CACHE_HOME:-~/.cache}/jllama/peers, outside the checkout: one for each
name and key, the key being of tests/peers/requirements-NAME.txt, the Python and the index. One that
was left half made is made again; old ones may be deleted at any time.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent


def interpreter(name: str, torch_index: str) -> Path:
    """The python of peer `name`, with all of its requirements installed."""
    requirements = HERE / f"requirements-{name}.txt"
    key = hashlib.sha256(requirements.read_bytes())
    key.update(f"{sys.version} {sys.base_prefix} {torch_index}".encode())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = caches / "jllama" / "peers" / f"{name}-{key.hexdigest()[:12]}"
    python, whole = root / "bin" / "python", root / "whole"
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{root}.lock", "w") as lock:  # released when the process ends, however it does
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(root, ignore_errors=True)
            print(f"making {root} ...", file=sys.stderr, flush=True)
            venv.create(root, with_pip=True, symlinks=True)
            install = [python, "-m", "pip", "--disable-pip-version-check", "-qq", "install"]
            torch = [r for r in requirements.read_text().splitlines() if r.startswith("torch==")]
            if torch and torch_index:
                # Alone, for the index has nothing else that the others should be looked for in.
                index = ["--extra-index-url", torch_index]
                subprocess.run([*install, "--no-deps", *index, *torch], stdout=2, check=True)
            subprocess.run([*install, "-r", requirements], stdout=2, check=True)
            whole.touch()
    return python


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of tests/peers/requirements-NAME.txt")
    parser.add_argument("--torch-index", default="", help="where torch's own wheels are")
    args = parser.parse_args()
    try:
        print(interpreter(args.name, args.torch_index))
    except subprocess.CalledProcessError as e:
        sys.exit(f"error: installing the peer {args.name} failed: {' '.join(map(str, e.cmd))}")
