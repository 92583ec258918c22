"""The key of a stage: a digest of everything that can change its result.

That is the stage and its version, the settings that matter to it, the content of the files it reads, and the keys of
what it is built on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmphi.errors import SettingsError
from mmphi.fields import field_of, leaves
from mmphi.settings import Settings
from mmphi.stage import Stage

RACY_S = 2.0  # A file written this recently may change again within the resolution of its modification time.


def cache_folder() -> Path:
    """Where this user's machine keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmphi"


def mattering(settings: Settings, sections: Iterable[str]) -> dict[str, Any]:
    """The values of sections that can change a result, by dotted name."""
    found = {}
    for section in sections:
        for name, value in leaves(getattr(settings, section), section):
            field = field_of(name)
            if field is None or field.matters:
                found[name] = value
    return found


def key_parts(
    stage: Stage, settings: Settings, digests: Mapping[str, str], upstream: Mapping[str, str]
) -> dict[str, Any]:
    """What a key is the digest of, as a flat table that can be compared with another's.

    Args:
        stage: The stage.
        settings: All settings.
        digests: Content of the files it reads, by the setting that names them; stands in place of the path.
        upstream: Keys of what it is built on, by stage.
    """
    parts: dict[str, Any] = {"stage": stage.name, "version": stage.version, "seed": settings.seed}
    parts.update(mattering(settings, stage.sections))
    parts.update({name: f"sha256:{digest}" for name, digest in digests.items()})
    parts.update({f"upstream.{name}": key for name, key in upstream.items()})
    return parts


def key_of(parts: Mapping[str, Any]) -> str:
    """32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def difference(parts: Mapping[str, Any], before: Mapping[str, Any], shown: int = 3) -> str:
    """In what the parts of two keys differ, in words; empty where they do not."""
    changed = [name for name in {**parts, **before} if parts.get(name) != before.get(name)]
    said = [f"{name} is {_short(parts.get(name))}, was {_short(before.get(name))}" for name in changed[:shown]]
    return "; ".join(said) + (f" and {len(changed) - shown} more" if len(changed) > shown else "")


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """Content digests of files and folders, remembered by size and modification time.

    The memory only saves time: lost or deleted, everything is read again.

    Args:
        memory: JSON file to remember in.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory or cache_folder() / "digests.json"
        self._known: dict[str, list[str]] | None = None

    def of(self, path: Path) -> str:
        """SHA-256 of a file's content, or of the names and contents of all files in a folder.

        Raises:
            SettingsError: If it cannot be read.
        """
        path = path.resolve()
        try:
            listed = [(file, file.stat()) for file in _files(path)]
            look = hashlib.sha256()
            for file, stat in listed:
                look.update(f"{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
            known = self._remembered().get(str(path))
            if known and known[0] == look.hexdigest():
                return known[1]
            digest = file_digest(path) if path.is_file() else _folder_digest(path, (file for file, _ in listed))
        except OSError as error:
            raise SettingsError(f"{path} cannot be read: {error.strerror}", "check that you may read it") from error
        if all(time.time() - stat.st_mtime > RACY_S for _, stat in listed):
            self._remember(str(path), [look.hexdigest(), digest])
        return digest

    def _remembered(self) -> dict[str, list[str]]:
        if self._known is None:
            self._known = {}
            with contextlib.suppress(OSError, ValueError):
                self._known = dict(json.loads(self._memory.read_text()))
        return self._known

    def _remember(self, path: str, entry: list[str]) -> None:
        self._known = None  # Others may have written since.
        self._known = {**self._remembered(), path: entry}
        with contextlib.suppress(OSError):
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            part = self._memory.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(self._known))
            part.replace(self._memory)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _folder_digest(folder: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file_digest(file).encode())
    return digest.hexdigest()
