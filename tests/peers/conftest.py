"""The peers' interpreters, and what the tests measured as a table at the end of the session."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
_MEASURED = "measured beside a peer"


@pytest.fixture(scope="session")
def run_peer():
    """`run_peer(name, module, jobs, folder)`: tests.peers.scripts.MODULE under the peer's Python.

    The jobs go to it as a JSON file in `folder`. Skips where `make test-peers` made no such peer.
    """

    def run(name: str, module: str, jobs: list[dict], folder: Path) -> None:
        variable = f"JLLAMA_PEER_{name.upper().replace('-', '_')}"
        if not (python := os.environ.get(variable)):
            pytest.skip(f"{variable} is unset: no {name}")
        file = folder / "jobs.json"
        file.write_text(json.dumps(jobs, default=str))
        done = subprocess.run(
            [python, "-m", f"tests.peers.scripts.{module}", file],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-4000:]}"

    return run


@pytest.fixture
def measured(request):
    """`measured(pair, direction, error, own)`: a row; `own` is the peer's own error."""

    def row(pair: str, direction: str, error: float, own: float | None = None) -> None:
        request.node.user_properties.append((_MEASURED, [pair, direction, error, own]))

    return row


def pytest_terminal_summary(terminalreporter):
    found = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for key, value in report.user_properties
        if key == _MEASURED
    ]
    # Directions with the same errors share a row.
    rows: dict[tuple[str, str, str], list[str]] = {}
    for pair, direction, error, own in sorted(found, key=lambda row: row[:2]):
        figures = f"{error:.1e}", "" if own is None else f"{own:.1e}"
        rows.setdefault((pair, *figures), []).append(direction)
    if rows:
        terminalreporter.section("beside the peers")
        terminalreporter.line("| pair | direction | largest error | peer's own error |")
        terminalreporter.line("|---|---|---|---|")
    for (pair, error, own), directions in rows.items():
        terminalreporter.line(f"| {pair} | {', '.join(directions)} | {error} | {own} |")
