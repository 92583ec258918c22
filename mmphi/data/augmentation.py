"""Other views of an image: a part of it, mirrored by half, so that a training on few images does not see each as ever.

A view is asked for by a name: the digest of the image's content and a number. The same name is the same view,
wherever and whenever it is made. View 0 is the image itself.
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageOps

MARK = "/view-"
AREA = (0.5, 1.0)  # Share of the image that a view shows: less may leave out what a caption says.
RATIO = (3 / 4, 4 / 3)  # Its width to its height, beside the image's own.


def augmented_name(digest: str, view: int) -> str:
    """What a view of an image is called."""
    return f"{digest}{MARK}{view}" if view else digest


def augmented_image(image: Image.Image, name: str) -> Image.Image:
    """The view of an image that a name asks for."""
    if MARK not in name:
        return image
    draw = random.Random(name)
    area = draw.uniform(*AREA)
    ratio = math.exp(draw.uniform(*map(math.log, RATIO)))
    width = min(image.width, max(1, round(image.width * math.sqrt(area * ratio))))
    height = min(image.height, max(1, round(image.height * math.sqrt(area / ratio))))
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    part = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(part) if draw.random() < 0.5 else part
