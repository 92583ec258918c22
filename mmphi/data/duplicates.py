"""Finds image files with the same picture, so that none is used in training while another is used in a test.

Files with equal content are one picture, whatever their names: COCO 2014 and COCO 2017 name the same photographs
differently. Near duplicates (another size, another compression) are found by the difference hash: of an image scaled to
9 x 8 grey pixels, whether each is brighter than its right neighbour.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmphi.data.content_hash import Digests
from mmphi.data.images import open_image
from mmphi.errors import ImageError

SIDE = 8
# Maximum number of different bits. Of 400 photographs of Flickr8k, 97.5 % differ in at most 5 bits from their copies at
# 5/8 of the size in JPEG of quality 60; of the 79,800 pairs of different photographs, none differs in fewer than 11.
NEAR = 5
FLAT = 8  # Minimum number of ones and of zeros in a hash; an image with fewer has no near duplicates.
COLOURS = 16  # Maximum mean difference of the colours of near duplicates, of 255.
COMPARED = 256
WIDTHS = (11, 11, 11, 11, 10, 10)  # Bits per band; with NEAR + 1 bands, near duplicates agree in at least one.
BAR_FROM = 2000


def picture_names(paths: Iterable[Path], *, near: bool = False) -> dict[Path, str]:
    """Returns a name for each file; files with the same picture have the same name.

    Args:
        paths: Image files; an unreadable file counts as a separate picture.
        near: Whether near duplicates count as the same picture.
    """
    unique = list(dict.fromkeys(paths))
    digests = Digests().of_files(unique, "image digests")
    names = {path: digests.get(path) or str(path) for path in unique}
    if not near:
        return names
    first = {name: path for path, name in reversed(names.items())}  # One file of each content is opened.
    groups = merge_near_duplicates({names[path]: look for path, look in _looks(list(first.values())).items()})
    return {path: groups.get(name, name) for path, name in names.items()}


@dataclass(frozen=True)
class ImageFingerprint:
    """Fingerprint of an image, to find near duplicates.

    Attributes:
        bits: Difference hash, 64 bits.
        colours: RGB bytes of the image scaled to 4 x 4 pixels.
    """

    bits: int
    colours: bytes

    @property
    def flat(self) -> bool:
        """Whether the image is too uniform for a meaningful hash."""
        return not FLAT <= self.bits.bit_count() <= SIDE * SIDE - FLAT

    def near(self, other: ImageFingerprint) -> bool:
        """Whether another image is a near duplicate."""
        if (self.bits ^ other.bits).bit_count() > NEAR:
            return False
        apart = sum(abs(a - b) for a, b in zip(self.colours, other.colours, strict=True))
        return apart <= COLOURS * len(self.colours)


def merge_near_duplicates(looks: Mapping[str, ImageFingerprint]) -> dict[str, str]:
    """Returns, for each name, the first near duplicate that is not a duplicate of another itself; else the name.

    Groups are not chained: each image is near the first of its group. Of the images whose hashes share a band, only the
    first :data:`COMPARED` are compared, to avoid quadratic time for many images with an equal edge.
    """
    first: dict[str, str] = {}
    bands: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, look in looks.items():
        first[name] = name
        if look.flat:
            continue
        keys, left = [], look.bits
        for band, width in enumerate(WIDTHS):
            keys.append((band, left & (1 << width) - 1))
            left >>= width
        alike = dict.fromkeys(other for key in keys for other in bands[key])
        found = next((other for other in alike if look.near(looks[other])), None)
        if found is not None:
            first[name] = found
            continue
        for key in keys:
            if len(bands[key]) < COMPARED:
                bands[key].append(name)
    return first


def fingerprint_of(image: Image.Image) -> ImageFingerprint:
    """Returns the fingerprint of an RGB image."""
    small = image.resize((4, 4), Image.Resampling.BOX)
    return ImageFingerprint(difference_hash(image), small.tobytes())


def difference_hash(image: Image.Image) -> int:
    """Returns the 64-bit difference hash of an RGB image."""
    grey = image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    pixels = list(grey.tobytes())
    bits = 0
    for row in range(SIDE):
        for column in range(SIDE):
            place = row * (SIDE + 1) + column
            bits = bits << 1 | (pixels[place] > pixels[place + 1])
    return bits


def _looks(paths: Sequence[Path]) -> dict[Path, ImageFingerprint]:
    """Fingerprints of the readable files."""
    from tqdm.auto import tqdm

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = tqdm(
            pool.map(_look, paths),
            total=len(paths),
            desc="near duplicates",
            unit="image",
            disable=len(paths) < BAR_FROM,
        )
        return {path: look for path, look in zip(paths, found, strict=True) if look is not None}


def _look(path: Path) -> ImageFingerprint | None:
    try:
        return fingerprint_of(open_image(path))
    except ImageError:
        return None
