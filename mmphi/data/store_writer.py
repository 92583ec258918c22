"""Common part of the writers of features: recorded progress, which survives a kill, and the index that ends it."""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

INDEX, PROGRESS = "index.json", "progress.jsonl"
P = TypeVar("P")


class StoreWriter(ABC, Generic[P]):
    """Progress of a store; a batch is recorded completely or not at all.

    Args:
        folder: Output folder; features in it are kept.

    Attributes:
        places: Place of the features of every content written so far, by digest.
        unreadable: Reasons by digest, for contents without features.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, P] = {}
        self.unreadable: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        path, whole = folder / PROGRESS, 0
        if not path.exists():
            return
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # Truncated by a kill; its contents are processed again.
                self._note(json.loads(line))
                whole += len(line)
        os.truncate(path, whole)

    def knows(self, digest: str) -> bool:
        """Whether a content was written or found unreadable."""
        return digest in self.places or digest in self.unreadable

    @abstractmethod
    def _note(self, batch: Mapping[str, Any]) -> None:
        """Take the places and unreadable contents of a recorded batch into this object."""

    def _record(self, batch: Mapping[str, Any]) -> None:
        with (self.folder / PROGRESS).open("a") as file:
            file.write(json.dumps(batch) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._note(batch)

    def _free_name(self) -> str:
        number = len(list(self.folder.glob("features-*.npy")))
        while (self.folder / f"features-{number:05d}.npy").exists():
            number += 1
        return f"features-{number:05d}.npy"

    def _link(self, file: Path) -> str:
        """Add a file of another store, by a hard link if possible; returns its name here."""
        name = self._free_name()
        try:
            os.link(file, self.folder / name)
        except OSError:  # Another disk, or one without hard links.
            shutil.copy2(file, self.folder / name)
        return name

    def _complete(self, index: Mapping[str, Any], used: Collection[str]) -> None:
        """Delete the unused files of interrupted calls, and write the index, which completes the store."""
        for path in self.folder.glob("features-*"):
            if path.name not in used:
                path.unlink()
        part = self.folder / f"{INDEX}.part"
        part.write_text(json.dumps(index))
        part.rename(self.folder / INDEX)
