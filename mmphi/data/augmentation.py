"""Augmented views of an image: a random crop, mirrored with probability 0.5, for training on few images.

A view is identified by a name: the digest of the image's content and a number. Equal names give equal views on every
machine. View 0 is the image itself.
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageOps

MARK = "/view-"
AREA = (0.5, 1.0)  # Area of a crop as a share of the image: a smaller crop may omit what the caption describes.
RATIO = (3 / 4, 4 / 3)  # Aspect ratio of a crop, relative to that of the image.


def augmented_name(digest: str, view: int) -> str:
    """Returns the name of a view of an image."""
    return f"{digest}{MARK}{view}" if view else digest


def augmented_image(image: Image.Image, name: str) -> Image.Image:
    """Returns the view of an image that a name identifies."""
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
