"""Benchmarks; each module's docstring has the command that runs it."""
