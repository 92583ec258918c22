"""Which image files show the same picture, so that none of them is trained on while another is tested on.

Files of the same content are one picture whatever they are called: COCO of 2014 and of 2017 name the same photographs
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
# Of 400 photographs of Flickr8k, 97.5 % differ in 5 bits at most from themselves at 5/8 of the size in JPEG of quality
# 60; of the 79,800 pairs of different ones none differs in fewer than 11.
NEAR = 5
FLAT = 8  # Bits that a hash has of either kind at least; an image of fewer is no near duplicate of any other.
COLOURS = 16  # Mean difference of the colours of near duplicates at most, of 255.
COMPARED = 256
WIDTHS = (11, 11, 11, 11, 10, 10)  # Bands of bits, one more than may differ: one of them is equal.
BAR_FROM = 2000


def picture_names(paths: Iterable[Path], *, near: bool = False) -> dict[Path, str]:
    """A name for each file, which files of one picture share.

    Args:
        paths: Image files. One that cannot be read is a picture of its own.
        near: Whether near duplicates are one picture.
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
    """What near duplicates are found by.

    Attributes:
        bits: The difference hash.
        colours: Of the image scaled to 4 x 4 pixels, in bytes.
    """

    bits: int
    colours: bytes

    @property
    def flat(self) -> bool:
        """Whether so little differs from place to place that the hash tells nothing."""
        return not FLAT <= self.bits.bit_count() <= SIDE * SIDE - FLAT

    def near(self, other: ImageFingerprint) -> bool:
        """Whether another image shows nearly the same."""
        if (self.bits ^ other.bits).bit_count() > NEAR:
            return False
        apart = sum(abs(a - b) for a, b in zip(self.colours, other.colours, strict=True))
        return apart <= COLOURS * len(self.colours)


def merge_near_duplicates(looks: Mapping[str, ImageFingerprint]) -> dict[str, str]:
    """For each name the first one that shows nearly the same, and is no duplicate of another itself; else itself.

    Groups are not chained: every one is near the first of its group. Of images whose hashes share a band only the
    first :data:`COMPARED` are compared, so that many images with an equal edge cost no quadratic time.
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
    """What near duplicates of an image in RGB are found by."""
    small = image.resize((4, 4), Image.Resampling.BOX)
    return ImageFingerprint(difference_hash(image), small.tobytes())


def difference_hash(image: Image.Image) -> int:
    """64 bits of an image in RGB."""
    grey = image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    pixels = list(grey.tobytes())
    bits = 0
    for row in range(SIDE):
        for column in range(SIDE):
            place = row * (SIDE + 1) + column
            bits = bits << 1 | (pixels[place] > pixels[place + 1])
    return bits


def _looks(paths: Sequence[Path]) -> dict[Path, ImageFingerprint]:
    """What those files that can be read look like."""
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
