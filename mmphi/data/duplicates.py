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
from pathlib import Path

from PIL import Image

from mmphi.data.digests import Digests
from mmphi.data.images import open_image
from mmphi.errors import ImageError

SIDE = 8
# Of 400 photographs of Flickr8k, 97.5 % differ in 5 bits at most from themselves at 5/8 of the size in JPEG of quality
# 60; of the 79,800 pairs of different ones none differs in fewer than 11.
NEAR = 5
WIDTHS = (11, 11, 11, 11, 10, 10)  # Bands of bits, one more than may differ: one of them is equal.
BAR_FROM = 2000


def pictures(paths: Iterable[Path], *, near: bool = False) -> dict[Path, str]:
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
    hashes = {names[path]: bits for path, bits in _hashed(list(first.values())).items()}
    groups = joined(hashes)
    return {path: groups.get(name, name) for path, name in names.items()}


def joined(hashes: Mapping[str, int]) -> dict[str, str]:
    """For each name the first one of its group: those whose hashes differ by :data:`NEAR` bits at most, and theirs."""
    parent = {name: name for name in hashes}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    same: dict[int, list[str]] = defaultdict(list)
    for name, bits in hashes.items():
        same[bits].append(name)
    bands: dict[tuple[int, int], list[int]] = defaultdict(list)
    for bits, names in same.items():
        for name in names[1:]:
            parent[root(name)] = root(names[0])
        left = bits
        for band, width in enumerate(WIDTHS):
            alike = bands[band, left & (1 << width) - 1]
            left >>= width
            for other in alike:
                if (bits ^ other).bit_count() <= NEAR:
                    parent[root(names[0])] = root(same[other][0])
            alike.append(bits)
    return {name: root(name) for name in hashes}


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


def _hashed(paths: Sequence[Path]) -> dict[Path, int]:
    """Difference hashes of those files that can be read."""
    from tqdm.auto import tqdm

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = tqdm(
            pool.map(_hash, paths),
            total=len(paths),
            desc="near duplicates",
            unit="image",
            disable=len(paths) < BAR_FROM,
        )
        return {path: bits for path, bits in zip(paths, found, strict=True) if bits is not None}


def _hash(path: Path) -> int | None:
    try:
        return difference_hash(open_image(path))
    except ImageError:
        return None
