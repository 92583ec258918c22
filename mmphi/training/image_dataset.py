"""Preprocessed images of an encoder: decoded on access, and cached up to a size limit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from torch.utils.data import Dataset

from mmphi.data.images import open_image
from mmphi.errors import ImageError

KEPT_BYTES = 512 * 1024**2  # Limit of the cache of decoded images, per process.


class ImageDataset(Dataset[Tensor]):
    """Images decoded and preprocessed on access.

    Args:
        paths: Image files, all of them readable.
        preprocess: Maps a PIL image to pixels (3, H, W).
    """

    def __init__(self, paths: Sequence[Path], preprocess: Callable[[Any], Tensor]) -> None:
        self.paths, self.preprocess = list(paths), preprocess
        self._kept: dict[Path, Tensor] = {}
        self._bytes = 0

    @classmethod
    def readable(
        cls, paths: Sequence[Path], preprocess: Callable[[Any], Tensor]
    ) -> tuple[Self, dict[Path, ImageError]]:
        """Returns a dataset of the readable files and the errors of the others; decodes every file, on all cores.

        Args:
            paths: Image files.
            preprocess: Maps a PIL image to pixels (3, H, W).
        """
        pixels, wrong = cls([], preprocess), dict[Path, ImageError]()

        def look(path: Path) -> None:
            try:
                pixels.look(path) if pixels.room else open_image(path)
            except ImageError as error:
                wrong[path] = error

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for _ in threads.map(look, paths):
                pass
        pixels.paths = [path for path in paths if path not in wrong]
        return pixels, {path: wrong[path] for path in paths if path in wrong}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.look(self.paths[index])

    @property
    def room(self) -> bool:
        """Whether the cache is below its limit."""
        return self._bytes < KEPT_BYTES

    @property
    def kept(self) -> bool:
        """Whether all images are in the cache."""
        return set(self.paths) <= self._kept.keys()

    def look(self, path: Path) -> Tensor:
        """Returns the pixels of an image file, and caches them while there is room.

        Raises:
            ImageError: If the file cannot be read.
        """
        if path in self._kept:
            return self._kept[path]
        pixels = self.preprocess(open_image(path))
        if self._bytes + pixels.nbytes <= KEPT_BYTES:
            self._bytes += pixels.nbytes
            self._kept[path] = pixels
        return pixels
