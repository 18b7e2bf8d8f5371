"""Whether a source is still what was prepared from it: sizes, versions and digests of its files.

A file of the same size and version (`jllama.files.storage.Stat`) is the same. A local one whose
time of change differs, as after a copy, is compared by its SHA-256, once: what was found equal is
noted in `verified.json` beside the dataset, where that can be written. Objects at a URL have no
SHA-256 here: the store's own checksum or tag is their version, and hashing would read them again.
"""

import contextlib
import json
from pathlib import Path

from jllama.config import SourceConfig
from jllama.data import files
from jllama.data import source as sources
from jllama.data.prepared import Prepared
from jllama.errors import UserError
from jllama.files import storage
from jllama.progress import say

VERIFIED = "verified.json"
_KEPT = 16  # versions of a file that are remembered: machines with copies of their own


def manifest(source: SourceConfig, before: list[sources.SourceFile]) -> list[dict]:
    """The source's files for `identity.json`; UserError if they are not as `before` the reading."""
    if sources.source_files(source.source) != before:
        raise UserError(
            f"{sources.summary(source.source)}: its files changed while they were read; run again"
        )
    return [
        {
            "name": f.name,
            "size": f.size,
            "version": f.version,
            "sha256": None if storage.is_remote(f.path) else files.digest(f.path),
        }
        for f in before
    ]


def check(prepared: Prepared, source: SourceConfig, max_skipped: int) -> None:
    """UserError unless the source is still what was prepared, within what may be skipped now."""
    identity = prepared.identity
    if identity["skipped"] > max_skipped:
        raise UserError(
            f"{prepared.folder}: {identity['skipped']} bad documents were skipped, above"
            f" data.prepare.max_skipped={max_skipped}; raise it, or mend the source and delete the"
            " folder"
        )
    was = {f["name"]: f for f in identity["source_files"]}
    try:
        now = {f.name: f for f in sources.source_files(source.source, fetch=False)}
    except UserError as e:
        # Prepared elsewhere, and the text is not on this machine: the tokens are all there is.
        say(f"{prepared.folder}: used as prepared; its source is not here: {e}")
        return
    for name in sorted(was.keys() ^ now.keys()):
        _changed(prepared, name, "is gone" if name in was else "is new")
    _compare(prepared, was, now)


def _compare(prepared: Prepared, was: dict[str, dict], now: dict[str, sources.SourceFile]) -> None:
    others = []
    for name in sorted(was):
        if now[name].size != was[name]["size"]:
            _changed(prepared, name, "has changed")
        if now[name].version != was[name].get("version"):
            others.append(name)
    verified = _read(prepared.folder) if others else {}
    others = [n for n in others if now[n].version not in verified.get(n, ())]
    if not others:
        return
    say(f"{prepared.folder}: comparing {len(others)} source files whose times of change differ")
    for name in others:
        wanted = was[name]["sha256"]
        if wanted is None or files.digest(now[name].path) != wanted:
            _changed(prepared, name, "has changed")
        verified[name] = [*verified.get(name, ()), now[name].version][-_KEPT:]
    # A dataset that only others may write is compared again at the next start.
    with contextlib.suppress(UserError):
        storage.write_text(prepared.folder / VERIFIED, json.dumps(verified, indent=1))


def _read(folder: Path) -> dict[str, list[str]]:
    try:
        return json.loads(storage.read_text(folder / VERIFIED))
    except (FileNotFoundError, ValueError):
        return {}


def _changed(prepared: Prepared, name: str, how: str) -> None:
    raise UserError(
        f"{name}: {how} since {prepared.folder} was made from it; "
        "delete that folder to prepare anew, or restore the file"
    )
