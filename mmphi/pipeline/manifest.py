"""The list of a finished result's files, written last: what it does not confirm is not a result.

Sizes are checked always. Contents are read again only where a file's modification time is not the one noted, so that a
result of gigabytes is confirmed in milliseconds, while a file that was edited, cut short or copied over is found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from mmphi.data.content_hash import file_digest

MANIFEST = "manifest.json"


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST)


def write_manifest(folder: Path) -> None:
    """List every file with its size, digest and modification time; whole or not at all."""
    listed = {}
    for path in _files(folder):
        stat = path.stat()
        listed[path.relative_to(folder).as_posix()] = [stat.st_size, file_digest(path), stat.st_mtime_ns]
    part = folder / f".{MANIFEST}"
    with part.open("w") as file:
        json.dump(listed, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.rename(folder / MANIFEST)


def manifest_holds(folder: Path) -> bool:
    """Whether every listed file is there, as it was."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())
        return all(_unchanged(folder / name, *entry) for name, entry in listed.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _unchanged(path: Path, size: int, digest: str, modified_ns: int) -> bool:
    stat = path.stat()
    return stat.st_size == size and (stat.st_mtime_ns == modified_ns or file_digest(path) == digest)


def total_bytes(folder: Path) -> int:
    """Bytes of all files that a manifest lists."""
    return sum(entry[0] for entry in json.loads((folder / MANIFEST).read_text()).values())
