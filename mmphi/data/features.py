"""Image features, stored once and read by many processes, or computed anew."""

from __future__ import annotations

import bisect
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmphi.data.images import open_image
from mmphi.data.records import ImageRef
from mmphi.errors import ImageError, StoreError

if TYPE_CHECKING:
    from mmphi.models.vision import Tower

INDEX, PROGRESS = "index.json", "progress.jsonl"


class ImageFeatures(Protocol):
    """Where the features of images come from."""

    @property
    def tokens(self) -> int:
        """Features per image."""

    @property
    def width(self) -> int:
        """Width of a feature."""

    def __contains__(self, image_id: str, /) -> bool:
        """Whether the image with this id has features."""

    def get(self, images: Sequence[ImageRef]) -> Tensor:
        """Features of images, float16 on the CPU, (len(images), tokens, width)."""


class FeatureStore:
    """Features in memory-mapped files: opening costs nothing, and processes share what they read.

    Args:
        folder: As :class:`FeatureWriter` left it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            index = json.loads((folder / INDEX).read_text())
            self.tokens, self.width = int(index["tokens"]), int(index["width"])
            self._rows: dict[str, int] = index["rows"]
            self._shards = [np.load(folder / name, mmap_mode="r") for name in index["shards"]]
        except (OSError, KeyError, ValueError) as error:
            raise StoreError(f"no features can be read from {folder}: {error}", "run `mmphi embed --force`") from error
        self._starts = np.cumsum([0] + [len(s) for s in self._shards]).tolist()

    @classmethod
    def open(cls, folder: Path) -> FeatureStore:
        """Open the features of a finished ``embed``.

        Raises:
            StoreError: If they are not complete.
        """
        return cls(folder)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, image_id: str, /) -> bool:
        return image_id in self._rows

    def get(self, images: Sequence[ImageRef]) -> Tensor:
        """Features of images, float16, (len(images), tokens, width).

        Raises:
            StoreError: If an image has none.
        """
        out = np.empty((len(images), self.tokens, self.width), np.float16)
        for i, image in enumerate(images):
            row = self._rows.get(image.id)
            if row is None:
                raise StoreError(f"{image.id} has no stored features", "run `mmphi embed` on the same data")
            shard = bisect.bisect_right(self._starts, row) - 1
            out[i] = self._shards[shard][row - self._starts[shard]]
        return torch.from_numpy(out)


class LiveFeatures:
    """Features computed when asked for, rounded to float16 as stored ones are."""

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.tokens, self.width = tower.tokens, tower.width
        self._unreadable: dict[str, str] = {}

    def __contains__(self, image_id: str, /) -> bool:
        return image_id not in self._unreadable

    def check(self, images: Sequence[ImageRef]) -> None:
        """Open every image once, and remember which cannot be read."""
        for image in images:
            try:
                open_image(image.path)
            except ImageError as error:
                self._unreadable[image.id] = error.reason

    def get(self, images: Sequence[ImageRef]) -> Tensor:
        """Features of images, float16 on the CPU, (len(images), tokens, width)."""
        if not images:
            return torch.zeros(0, self.tokens, self.width, dtype=torch.float16)
        pixels = torch.stack([self.tower.preprocess(open_image(image.path)) for image in images])
        features: Tensor = self.tower(pixels)
        return features.half().cpu()


class FeatureWriter:
    """Writes features batch by batch; what was written before a kill is kept, and a batch counts whole or not at all.

    Args:
        folder: Where to write; goes on from what it holds.
        images: How many images there are at most.
        tokens: Features per image.
        width: Width of a feature.
        shard_images: Images per file.

    Attributes:
        rows: Row of every image written so far, by id.
        unreadable: Images that could not be read, and why.

    Raises:
        StoreError: If the disk cannot hold them.
    """

    def __init__(self, folder: Path, images: int, tokens: int, width: int, shard_images: int) -> None:
        self.folder, self.images, self.shard_images = folder, images, shard_images
        self.shape = tokens, width
        self.rows: dict[str, int] = {}
        self.digests: dict[str, int] = {}
        self.unreadable: dict[str, str] = {}
        self.written = 0
        self._shards: dict[int, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._recall()
        missing = self.bytes_for(images - self.written)
        free = shutil.disk_usage(folder).free
        if missing > free:
            raise StoreError(
                f"features of {images} images take {missing / 1e9:.2f} GB more; {folder} has {free / 1e9:.2f} GB free",
                "raise vision.pool, take fewer images (data.max_images), or put the store on a larger disk",
            )

    def bytes_for(self, images: int) -> int:
        """Bytes that the features of so many images take."""
        return images * self.shape[0] * self.shape[1] * 2

    @property
    def seen(self) -> int:
        """Images dealt with so far."""
        return len(self.rows) + len(self.unreadable)

    def _recall(self) -> None:
        path = self.folder / PROGRESS
        if not path.exists():
            return
        whole = 0
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # Torn by a kill; its batch is done again.
                batch = json.loads(line)
                self._note(batch["images"], batch["unreadable"])
                whole += len(line)
        os.truncate(path, whole)

    def _note(self, images: list[tuple[str, str, int]], unreadable: list[tuple[str, str]]) -> None:
        for image_id, digest, row in images:
            self.rows[image_id] = self.digests[digest] = row
            self.written = max(self.written, row + 1)
        self.unreadable.update(unreadable)

    def write(
        self, images: Sequence[tuple[str, str]], features: dict[str, Tensor], unreadable: Sequence[tuple[str, str]]
    ) -> None:
        """Write one batch.

        Args:
            images: Id and content digest of each image.
            features: Features (tokens, width) by digest, of the contents not seen before.
            unreadable: Id and reason of those that cannot be read.

        Raises:
            StoreError: If the disk is full; what was written before stays good.
        """
        noted: list[tuple[str, str, int]] = []
        fresh = dict(self.digests)
        try:
            for image_id, digest in images:
                if digest not in fresh:
                    row = self.written + len(fresh) - len(self.digests)
                    self._shard(row)[row % self.shard_images] = features[digest].numpy()
                    fresh[digest] = row
                noted.append((image_id, digest, fresh[digest]))
            for shard in self._shards.values():
                shard.flush()
            with (self.folder / PROGRESS).open("a") as file:
                file.write(json.dumps({"images": noted, "unreadable": list(unreadable)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(
                f"features cannot be written to {self.folder}: {error.strerror}",
                f"make room and run the same command: it goes on after {self.seen} images",
            ) from error
        self._note(noted, list(unreadable))

    def _shard(self, row: int) -> Any:
        number = row // self.shard_images
        if number not in self._shards:
            path = self.folder / f"features-{number:05d}.npy"
            if not path.exists():
                shape = (min(self.shard_images, self.images - number * self.shard_images), *self.shape)
                part = path.with_suffix(".part")
                np.lib.format.open_memmap(part, "w+", np.float16, shape).flush()
                # A memory map on a full disk dies of SIGBUS; space that is reserved cannot run out.
                with part.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
                part.rename(path)
            self._shards = {number: np.load(path, mmap_mode="r+")}
        return self._shards[number]

    def finish(self) -> None:
        """Write the index, and so make the store complete."""
        shards = sorted(path.name for path in self.folder.glob("features-*.npy"))
        index = {"tokens": self.shape[0], "width": self.shape[1], "shards": shards, "rows": self.rows}
        part = self.folder / f"{INDEX}.part"
        part.write_text(json.dumps(index))
        part.rename(self.folder / INDEX)
