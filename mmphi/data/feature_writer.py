"""Writes image features in batches; a batch is stored completely or not at all, and survives a later kill."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmphi.data.store_writer import INDEX, StoreWriter
from mmphi.errors import StoreError


class FeatureWriter(StoreWriter[tuple[str, int]]):
    """Writes image features, keyed by the digest of the image's content.

    Args:
        folder: Output folder; features in it are kept.
        tokens: Features per image.
        width: Width of a feature.
        shard_images: Images per new file.
        encoder: Digest of the encoder.

    Attributes:
        places: File and row of every content written so far, by digest.
        unreadable: Reasons by digest, for contents that cannot be read as images.
    """

    def __init__(self, folder: Path, tokens: int, width: int, shard_images: int, encoder: str = "") -> None:
        super().__init__(folder)
        self.shape, self.shard_images, self.encoder = (tokens, width), shard_images, encoder
        self._shard: Any = None
        self._name, self._filled, self._remaining = "", 0, 0

    def bytes_for(self, images: int) -> int:
        """Returns the size in bytes of the features of ``images`` images."""
        return images * self.shape[0] * self.shape[1] * 2

    def reserve(self, images: int) -> None:
        """Check that the disk has space for the features of ``images`` more images.

        Raises:
            StoreError: If it does not.
        """
        missing, free = self.bytes_for(images), shutil.disk_usage(self.folder).free
        if missing > free:
            raise StoreError(
                f"features of {images} images take {missing / 1e9:.2f} GB; {self.folder} has {free / 1e9:.2f} GB free",
                "raise vision.pool, take fewer images (data.max_images), or put the store on a larger disk",
            )
        self._remaining = images

    def _note(self, batch: Mapping[str, Any]) -> None:
        self.places.update({digest: (batch["shard"], row) for digest, row in batch["rows"]})
        self.unreadable.update(batch["unreadable"])

    def _write_down(self, shard: str, rows: Sequence[tuple[str, int]], unreadable: Mapping[str, str]) -> None:
        self._record({"shard": shard, "rows": rows, "unreadable": unreadable})

    def take_over(self, earlier: Path) -> int:
        """Add the features of an earlier store of the same encoder, by hard links if possible.

        Returns:
            Number of contents added.
        """
        index = json.loads((earlier / INDEX).read_text())
        fresh: dict[int, list[tuple[str, int]]] = {}
        for digest, (shard, row) in index["rows"].items():
            if not self.knows(digest):
                fresh.setdefault(shard, []).append((digest, row))
        for shard, rows in fresh.items():
            self._write_down(self._link(earlier / index["shards"][shard]), rows, {})
        unreadable = {digest: why for digest, why in index["unreadable"].items() if not self.knows(digest)}
        if unreadable:
            self._write_down("", [], unreadable)
        return sum(map(len, fresh.values())) + len(unreadable)

    def write(self, features: Mapping[str, Tensor], unreadable: Mapping[str, str]) -> None:
        """Write one batch.

        Args:
            features: Features (tokens, width) by digest, of contents not written before.
            unreadable: Reasons by digest, for contents that are not images.

        Raises:
            StoreError: If the disk is full; earlier batches remain valid.
        """
        waiting = list(features.items())
        try:
            while waiting or unreadable:
                if waiting and (self._shard is None or self._filled == len(self._shard)):
                    self._begin_shard(len(waiting))
                room = len(self._shard) - self._filled if self._shard is not None else 0
                part, waiting = waiting[:room], waiting[room:]
                rows = [(digest, self._filled + i) for i, (digest, _) in enumerate(part)]
                for (_, row), (_, feature) in zip(rows, part, strict=True):
                    self._shard[row] = feature.numpy()
                if part:
                    self._shard.flush()
                self._write_down(self._name, rows, unreadable)
                self._filled += len(part)
                unreadable = {}
        except OSError as error:
            raise StoreError(
                f"features cannot be written to {self.folder}: {error.strerror}",
                f"make room and run the same command: it resumes after {len(self.places)} images",
            ) from error

    def _begin_shard(self, at_least: int) -> None:
        images = max(1, min(self.shard_images, max(at_least, self._remaining)))
        self._name = self._free_name()
        path = self.folder / self._name
        part = path.with_suffix(".part")
        np.lib.format.open_memmap(part, "w+", np.float16, (images, *self.shape)).flush()
        # Writing to a memory map on a full disk raises SIGBUS, so the space is allocated first.
        with part.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        part.rename(path)
        self._shard, self._filled = np.load(path, mmap_mode="r+"), 0
        self._remaining = max(0, self._remaining - images)

    def finish(self) -> None:
        """Write the index, which completes the store, and delete unused files of interrupted calls."""
        names = sorted({name for name, _ in self.places.values()})
        number = {name: i for i, name in enumerate(names)}
        index = {
            "tokens": self.shape[0],
            "width": self.shape[1],
            "tower": self.encoder,
            "shards": names,
            "rows": {digest: (number[name], row) for digest, (name, row) in self.places.items()},
            "unreadable": self.unreadable,
        }
        self._complete(index, number)
