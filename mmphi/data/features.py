"""Image features, stored for many processes or computed on demand, keyed by the image's content."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmphi.data.augmentation import augmented_image, augmented_name
from mmphi.data.content_hash import FileDigests
from mmphi.data.images import open_image
from mmphi.data.in_memory import pixels_in
from mmphi.data.lru_cache import LockedLRUCache
from mmphi.data.schema import ImageRef
from mmphi.data.store_writer import INDEX
from mmphi.errors import ImageError, StoreError

LOOKED = 64  # Images whose precomputed features are kept.


class ImageFeatures(Protocol):
    """Interface of a source of image features."""

    @property
    def tokens(self) -> int:
        """Features per image."""

    @property
    def width(self) -> int:
        """Width of a feature."""

    @property
    def digest(self) -> str:
        """Digest of the encoder."""

    def __contains__(self, image: ImageRef, /) -> bool:
        """Whether an image has features."""

    def get(self, images: Sequence[ImageRef], /) -> Tensor:
        """Features of images, float16 on the CPU, (len(images), tokens, width)."""

    def length(self, image: ImageRef, /) -> int:
        """Number of features of an image."""

    def rows(self, images: Sequence[ImageRef], /) -> Tensor:
        """Concatenated features of images, float16 on the CPU, (len(images) * tokens, width)."""

    def prepare(self, images: Iterable[ImageRef], /) -> None:
        """Look up many images at once, before they are requested one by one."""


class FeatureStore:
    """Features in memory-mapped files: opening is cheap, and processes share the memory.

    Args:
        folder: Folder that :class:`~mmphi.data.feature_writer.FeatureWriter` has completed.
        digests: Digests of image files.

    Raises:
        StoreError: If the store is incomplete.
    """

    def __init__(self, folder: Path, digests: FileDigests | None = None) -> None:
        self._digests = digests or FileDigests()
        try:
            index = json.loads((folder / INDEX).read_text())
            self.tokens, self.width = int(index["tokens"]), int(index["width"])
            self._places: dict[str, tuple[int, int]] = index["rows"]
            # Plain arrays over the maps: indexing a numpy.memmap creates an object of a slower class for every row.
            self._shards = [np.asarray(np.load(folder / name, mmap_mode="r")) for name in index["shards"]]
            self.digest = str(index["tower"])
            self.unreadable: dict[str, str] = index["unreadable"]
        except (OSError, KeyError, ValueError) as error:
            raise StoreError(f"no features can be read from {folder}: {error}", "run `mmphi embed --force`") from error

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, image: ImageRef, /) -> bool:
        return self._name(image) in self._places

    def _name(self, image: ImageRef) -> str:
        return augmented_name(self._digests[image.path], image.view)

    def knows(self, digest: str) -> bool:
        """Whether an image's content was embedded or found unreadable."""
        return digest in self._places or digest in self.unreadable

    def prepare(self, images: Iterable[ImageRef], /) -> None:
        """Look up the digests of many image files at once."""
        self._digests.prepare(image.path for image in images)

    def get(self, images: Sequence[ImageRef], /) -> Tensor:
        """Features of images, float16, (len(images), tokens, width).

        Raises:
            StoreError: If an image has no stored features.
        """
        shards, rows = [], []
        for image in images:
            place = self._places.get(self._name(image))
            if place is None:
                raise StoreError(f"{image.id} has no stored features", "run `mmphi embed` on the same data")
            shards.append(place[0])
            rows.append(place[1])
        out = np.empty((len(images), self.tokens, self.width), np.float16)
        if len(set(shards)) == 1:  # One call copies faster than a loop does.
            self._shards[shards[0]].take(rows, axis=0, out=out, mode="clip")
        else:
            for i, (shard, row) in enumerate(zip(shards, rows, strict=True)):
                out[i] = self._shards[shard][row]
        return torch.from_numpy(out)

    def length(self, image: ImageRef, /) -> int:
        """Number of features of an image."""
        return self.tokens

    def rows(self, images: Sequence[ImageRef], /) -> Tensor:
        """Concatenated features, float16, (len(images) * tokens, width)."""
        return self.get(images).flatten(0, 1)


class Embeds(Protocol):
    """Interface of a vision encoder that live features require."""

    tokens: int
    width: int
    digest: str
    preprocess: Callable[[Any], Tensor]

    def __call__(self, pixels: Tensor, /) -> Tensor:
        """Features (N, tokens, width) of pixels (N, 3, H, W), as ``preprocess`` returns them."""


class LiveFeatures:
    """Features computed on demand, rounded to float16 like stored ones."""

    def __init__(self, encoder: Embeds) -> None:
        self.encoder = encoder
        self.tokens, self.width, self.digest = encoder.tokens, encoder.width, encoder.digest
        self._digests = FileDigests()
        self._unreadable: dict[Path, str] = {}
        self._looked: LockedLRUCache[Tensor] = LockedLRUCache(LOOKED)  # By the digest of the image's content.

    def __contains__(self, image: ImageRef, /) -> bool:
        return image.path not in self._unreadable

    @torch.inference_mode()
    def look(self, images: Sequence[ImageRef], check: Callable[[], None] = lambda: None, /) -> None:
        """Compute features in the caller's thread before they are requested; those of :data:`LOOKED` images are kept.

        Args:
            images: Images with their content in memory.
            check: Called before each image; an exception that it raises ends the computation.

        Raises:
            ImageError: If an image cannot be used.
        """
        new = {image.id: image for image in images if self._looked.get(image.id) is None}
        pixels = []
        for image in new.values():
            check()
            pixels.append(self._pixels(image))
        if pixels:
            features = self.encoder(torch.stack(pixels)).half().cpu()
            for name, own in zip(new, features, strict=True):
                self._looked.put(name, own.clone())  # A view would keep the whole batch in memory.

    def _pixels(self, image: ImageRef) -> Tensor:
        opened = open_image(image.source, image.name)
        if image.view:
            name = image.id if image.content is not None else self._digests[image.path]
            opened = augmented_image(opened, augmented_name(name, image.view))
        return self.encoder.preprocess(opened)

    def prepare(self, images: Iterable[ImageRef], /) -> None:
        """Open every image once, and record which cannot be read."""
        for path in dict.fromkeys(image.path for image in images):
            try:
                open_image(path)
                self._unreadable.pop(path, None)
            except ImageError as error:
                self._unreadable[path] = error.reason

    def get(self, images: Sequence[ImageRef], /) -> Tensor:
        """Features of images, float16 on the CPU, (len(images), tokens, width)."""
        if not images:
            return torch.zeros(0, self.tokens, self.width, dtype=torch.float16)
        known = [self._looked.get(image.id) if image.content is not None else None for image in images]
        missing = [i for i, features in enumerate(known) if features is None]
        if missing:
            fresh = self.encoder(torch.stack([self._pixels(images[i]) for i in missing])).half().cpu()
            for i, features in zip(missing, fresh, strict=True):
                known[i] = features
        return torch.stack([features for features in known if features is not None])

    def length(self, image: ImageRef, /) -> int:
        """Number of features of an image."""
        return self.tokens

    def rows(self, images: Sequence[ImageRef], /) -> Tensor:
        """Concatenated features, float16 on the CPU, (len(images) * tokens, width)."""
        return self.get(images).flatten(0, 1)


class CachedFeatures(LiveFeatures):
    """Features computed once and cached in memory, float16 on the CPU; the least recently used are evicted first.

    Args:
        encoder: Vision encoder.
        gigabytes: Size of the cache, in GB; evicted features are computed again on demand.
        batch_size: Images per forward pass.
    """

    def __init__(self, encoder: Embeds, gigabytes: float = 2.0, batch_size: int = 32) -> None:
        super().__init__(encoder)
        self.batch_size = batch_size
        self._kept: LockedLRUCache[Tensor] = LockedLRUCache(gigabytes * 1e9, lambda features: 2 * features.numel())

    def prepare(self, images: Iterable[ImageRef], /) -> None:
        """Do nothing: an unreadable image raises an error when it is used."""

    def _pixels(self, image: ImageRef) -> Tensor:
        pixels = pixels_in(image.source)
        if pixels is not None and image.view:
            raise ImageError("no augmentation", "pixels that are preprocessed cannot be augmented: give images")
        return super()._pixels(image) if pixels is None else pixels

    def look(self, images: Sequence[ImageRef], check: Callable[[], None] = lambda: None, /) -> None:
        """Compute features in the caller's thread before they are requested, and cache them.

        Args:
            images: Images.
            check: Called before each image; an exception that it raises ends the computation.

        Raises:
            ImageError: If an image cannot be read.
        """
        for image in images:
            check()
            self.get([image])

    def get(self, images: Sequence[ImageRef], /) -> Tensor:
        """Features of images, float16 on the CPU, (len(images), tokens, width).

        Raises:
            ImageError: If an image cannot be read.
        """
        names = [f"{self._digests[i.path] if i.content is None else i.id}/{i.view}" for i in images]
        found = {name: kept for name in names if (kept := self._kept.get(name)) is not None}
        missing = {name: image for name, image in zip(names, images, strict=True) if name not in found}
        wanted = list(missing.items())
        for first in range(0, len(wanted), self.batch_size):
            part = wanted[first : first + self.batch_size]
            pixels = _stacked([self._pixels(image) for _, image in part])
            features = self.encoder(pixels).half().cpu()
            if tuple(features.shape[1:]) != (self.tokens, self.width):
                raise ImageError(
                    "images of another size",
                    f"the encoder gives {tuple(features.shape[1:])} features for pixels {tuple(pixels.shape[1:])}, not"
                    f" {self.tokens, self.width} as for its test image: resize in preprocess, or give image_size",
                )
            for (name, _), own in zip(part, features, strict=True):
                found[name] = own.clone()  # A view would keep the whole batch in memory.
                self._kept.put(name, found[name])
        return torch.stack([found[name] for name in names]) if names else torch.zeros(0, self.tokens, self.width).half()


def _stacked(pixels: Sequence[Tensor]) -> Tensor:
    """Pixels of several images as one batch.

    Raises:
        ImageError: If the shapes differ.
    """
    shapes = {tuple(each.shape) for each in pixels}
    if len(shapes) > 1:
        raise ImageError("images of several sizes", f"the pixels have the shapes {sorted(shapes)}: preprocess them")
    return torch.stack(list(pixels))
