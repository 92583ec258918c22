"""Features of variable number per item, such as frames of recordings, stored once and keyed by content.

They are concatenated in files that are written completely or not at all; an index holds the first row of each item.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmphi.data.store_writer import INDEX, StoreWriter
from mmphi.errors import StoreError

Place = tuple[str, int, int]  # File, first row, number of rows.


class RaggedWriter(StoreWriter[Place]):
    """Writes features, keyed by the digest of the content that they represent.

    Args:
        folder: Output folder; features in it are kept.
        width: Width of a feature.
        model: Digest of the model that computes the features.

    Attributes:
        places: File, first row and number of rows of every content, by digest.
        unreadable: Reasons by digest, for contents without features.
    """

    def __init__(self, folder: Path, width: int, model: str) -> None:
        super().__init__(folder)
        self.width, self.model = width, model

    @property
    def bytes(self) -> int:
        """Size of all features in bytes."""
        return sum(rows for _, _, rows in self.places.values()) * self.width * 2

    def _note(self, batch: Mapping[str, Mapping[str, Any]]) -> None:
        self.places.update(
            {d: (str(name), int(begin), int(rows)) for d, (name, begin, rows) in batch["places"].items()}
        )
        self.unreadable.update(batch["unreadable"])

    def write(self, features: Mapping[str, Tensor], unreadable: Mapping[str, str]) -> None:
        """Write the features of some contents to a new file.

        Args:
            features: Features (n, width) by digest, of contents not written before; n may be 0.
            unreadable: Reasons by digest, for contents without features.

        Raises:
            StoreError: If the disk is full; earlier files remain valid.
        """
        name, places, begin = self._free_name(), dict[str, Place](), 0
        for digest, rows in features.items():
            places[digest] = name, begin, len(rows)
            begin += len(rows)
        try:
            if features:
                part = (self.folder / name).with_suffix(".part")
                with part.open("wb") as file:
                    np.save(file, torch.cat([*features.values()]).half().numpy())
                    file.flush()
                    os.fsync(file.fileno())
                part.rename(self.folder / name)
            if features or unreadable:
                self._record({"places": places, "unreadable": unreadable})
        except OSError as error:
            raise StoreError(
                f"features cannot be written to {self.folder}: {error.strerror}",
                f"make room and run the same command: it resumes after {len(self.places)} recordings",
            ) from error

    def take_over(self, earlier: Path) -> int:
        """Add the features of an earlier store of the same model, by hard links if possible.

        Returns:
            Number of contents added.
        """
        index = json.loads((earlier / INDEX).read_text())
        fresh = {digest: place for digest, place in index["places"].items() if not self.knows(digest)}
        names = {old: self._link(earlier / old) for old in sorted({place[0] for place in fresh.values()})}
        unreadable = {digest: why for digest, why in index["unreadable"].items() if not self.knows(digest)}
        if fresh or unreadable:
            places = {d: (names[old], begin, rows) for d, (old, begin, rows) in fresh.items()}
            self._record({"places": places, "unreadable": unreadable})
        return len(fresh) + len(unreadable)

    def finish(self) -> None:
        """Write the index, which completes the store, and delete unused files of interrupted calls."""
        index = {"width": self.width, "model": self.model, "places": self.places, "unreadable": self.unreadable}
        self._complete(index, {name for name, _, _ in self.places.values()})


class RaggedStore:
    """Features in memory-mapped files: opening is cheap, and processes share the memory.

    Args:
        folder: Folder that :class:`RaggedWriter` has completed.

    Attributes:
        width: Width of a feature.
        model: Digest of the model that computed the features.

    Raises:
        StoreError: If the store is incomplete.
    """

    def __init__(self, folder: Path) -> None:
        try:
            index = json.loads((folder / INDEX).read_text())
            self.width, self.model = int(index["width"]), str(index["model"])
            self._places: dict[str, Place] = index["places"]
            self.unreadable: dict[str, str] = index["unreadable"]
            names = {place[0] for place in self._places.values()}
            self._files = {name: np.load(folder / name, mmap_mode="r") for name in names}
        except (OSError, KeyError, ValueError) as error:
            raise StoreError(f"no features can be read from {folder}: {error}", "run `mmphi listen --force`") from error

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def knows(self, digest: str) -> bool:
        """Whether a content was written or found unreadable."""
        return digest in self._places or digest in self.unreadable

    def length(self, digest: str) -> int:
        """Number of features of a content."""
        return self._places[digest][2]

    def get(self, digest: str) -> Tensor:
        """Features of a content, float16, (n, width).

        Raises:
            StoreError: If the content has no stored features.
        """
        place = self._places.get(digest)
        if place is None:
            raise StoreError("a recording has no stored frames", "run `mmphi listen` on the same data")
        name, begin, rows = place
        return torch.from_numpy(np.array(self._files[name][begin : begin + rows]))
