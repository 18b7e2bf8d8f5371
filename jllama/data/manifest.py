"""Tells whether a source still is what a dataset was prepared from, file by file.

A file with the same size and version (`jllama.files.storage.Stat`) is unchanged. A local file whose
modification time differs, as after a copy, is compared by its SHA-256, once: the versions that were
equal are stored in `verified.json` beside the dataset, if its folder can be written. For objects at
a URL no SHA-256 is stored, because hashing would read them again; the store's own checksum or tag
is their version.
"""

import contextlib
import json
from pathlib import Path
from typing import NoReturn

from jllama.config import SourceConfig
from jllama.data import source as sources
from jllama.data import text_files
from jllama.data.prepared import Prepared
from jllama.errors import UserError
from jllama.files import storage
from jllama.progress import say

VERIFIED = "verified.json"
_MAX_VERSIONS = 16  # stored for each file: every machine may have a copy of its own


def manifest(source: SourceConfig, before: list[sources.SourceFile]) -> list[dict]:
    """Returns the entries of the source's files in `identity.json`.

    Raises UserError if the files changed since `before`, which was listed before they were read.
    """
    if sources.source_files(source.source) != before:
        raise UserError(
            f"{sources.summary(source.source)}: its files changed while they were read; run again"
        )
    return [
        {
            "name": f.name,
            "size": f.size,
            "version": f.version,
            "sha256": None if storage.is_remote(f.path) else text_files.file_digest(f.path),
        }
        for f in before
    ]


def check_unchanged(prepared: Prepared, source: SourceConfig, max_skipped: int) -> None:
    """Raises UserError if the source has changed since it was prepared, or too much was skipped.

    `max_skipped` is the number of documents that may have been skipped then.
    """
    identity = prepared.identity
    if identity["skipped"] > max_skipped:
        raise UserError(
            f"{prepared.folder}: {identity['skipped']} bad documents were skipped, above"
            f" data.prepare.max_skipped={max_skipped}; raise it, or mend the source and delete the"
            " folder"
        )
    before = {f["name"]: f for f in identity["source_files"]}
    try:
        now = {f.name: f for f in sources.source_files(source.source, fetch=False)}
    except UserError as e:
        # It was prepared elsewhere, and this machine has the tokens without the text.
        say(f"{prepared.folder}: used as prepared; its source is not on this machine: {e}")
        return
    for name in sorted(before.keys() ^ now.keys()):
        _raise_changed(prepared, name, "is gone" if name in before else "is new")
    _compare(prepared, before, now)


def _compare(
    prepared: Prepared, before: dict[str, dict], now: dict[str, sources.SourceFile]
) -> None:
    touched = []
    for name in sorted(before):
        if now[name].size != before[name]["size"]:
            _raise_changed(prepared, name, "has changed")
        if now[name].version != before[name].get("version"):
            touched.append(name)
    verified = _read_verified(prepared.folder) if touched else {}
    touched = [n for n in touched if now[n].version not in verified.get(n, ())]
    if not touched:
        return
    say(f"{prepared.folder}: comparing {len(touched)} source files whose modification times differ")
    for name in touched:
        wanted = before[name]["sha256"]
        if wanted is None or text_files.file_digest(now[name].path) != wanted:
            _raise_changed(prepared, name, "has changed")
        verified[name] = [*verified.get(name, ()), now[name].version][-_MAX_VERSIONS:]
    # If the folder cannot be written, the files are compared again at the next start.
    with contextlib.suppress(UserError):
        storage.write_text(prepared.folder / VERIFIED, json.dumps(verified, indent=1))


def _read_verified(folder: Path) -> dict[str, list[str]]:
    try:
        return json.loads(storage.read_text(folder / VERIFIED))
    except (storage.NoSuchFile, ValueError):
        return {}


def _raise_changed(prepared: Prepared, name: str, change: str) -> NoReturn:
    raise UserError(
        f"{name}: {change} since {prepared.folder} was made from it;"
        " delete that folder to prepare the source again, or restore the file"
    )
