"""`python -m jllama` is `jllama`."""

from jllama.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
