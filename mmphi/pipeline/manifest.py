"""The manifest lists the files of a finished result and is written last; without a valid manifest, there is no result.

File sizes are always checked. Contents are hashed again only if a file's modification time has changed, so a result of
gigabytes is verified in milliseconds, and edited, truncated or overwritten files are still detected.
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
    """Write the size, digest and modification time of every file in a folder, atomically."""
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
    """Whether the manifest exists and every listed file is unchanged."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())
        return all(_unchanged(folder / name, *entry) for name, entry in listed.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _unchanged(path: Path, size: int, digest: str, modified_ns: int) -> bool:
    stat = path.stat()
    return stat.st_size == size and (stat.st_mtime_ns == modified_ns or file_digest(path) == digest)


def total_bytes(folder: Path) -> int:
    """Total size of the files in a folder's manifest, in bytes."""
    return sum(entry[0] for entry in json.loads((folder / MANIFEST).read_text()).values())
