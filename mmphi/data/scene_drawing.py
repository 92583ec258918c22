"""Draws scenes as images: antialiased shapes of slightly varied colour and tilt on a varied pale background."""

from __future__ import annotations

import math
import os
import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image, ImageDraw

from mmphi.data.scenes import COLORS, Scene, Thing

OVERSAMPLING = 3
NOISE = 3.0
COMPRESSION = 3  # As small as PNG's default of 6 for images with noise, in half the time.
AHEAD = 64  # Maximum number of images in the queue.


def draw(scene: Scene, side: int, rng: random.Random) -> Image.Image:
    """Returns the image of a scene.

    Args:
        scene: Scene to draw.
        side: Width and height, in pixels.
        rng: Random number generator of background, tint, tilt and noise.
    """
    return drawing_function(scene, side, rng)()


def drawing_function(scene: Scene, side: int, rng: random.Random) -> Callable[[], Image.Image]:
    """Returns a function that draws a scene in any thread; ``rng`` is used only during this call.

    Args:
        scene: Scene to draw.
        side: Width and height, in pixels.
        rng: Random number generator of background, tint, tilt and noise.
    """
    ground = _ground(rng)
    things = [
        (thing, tuple(max(0, min(255, value + rng.randint(-14, 14))) for value in COLORS[thing.color]), _tilt(rng))
        for thing in (scene.big, scene.small)
    ]
    seed = rng.getrandbits(32)

    def image() -> Image.Image:
        large = side * OVERSAMPLING
        picture = ground(side).resize((large, large), Image.Resampling.BILINEAR)
        pen = ImageDraw.Draw(picture)
        for thing, tint, tilt in things:
            _draw_thing(pen, thing, large, tint, tilt)
        small = np.asarray(picture.resize((side, side), Image.Resampling.BOX), np.float32)
        noise = np.random.default_rng(seed).standard_normal((side, side, 1), np.float32)
        return Image.fromarray((small + NOISE * noise).clip(0, 255).astype(np.uint8))

    return image


class ImageWriter:
    """Draws and writes images in a thread pool; errors are raised in the calling thread."""

    def __init__(self, threads: int = 0) -> None:
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1)
        self._begun: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def save(self, image: Callable[[], Image.Image], path: Path) -> None:
        """Queue an image for drawing and writing; waits while more than :data:`AHEAD` images are queued."""
        self._begun.append(self._pool.submit(lambda: image().save(path, compress_level=COMPRESSION)))
        while len(self._begun) > AHEAD:
            self._begun.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for each in self._begun:
                each.result()


def _tilt(rng: random.Random) -> float:
    return rng.uniform(-0.18, 0.18)


def _ground(rng: random.Random) -> Callable[[int], Image.Image]:
    """Function from a side length to an image with a gradient between two pale tones."""
    tone = rng.uniform(185, 240)
    first, second = (np.array([tone + rng.uniform(-14, 14) for _ in range(3)]) for _ in range(2))
    angle = rng.uniform(0, 2 * math.pi)

    def image(side: int) -> Image.Image:
        ramp = np.linspace(0, 1, side)
        mix = (math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None] + 1) / 2
        pixels = first + (second - first) * mix[..., None].clip(0, 1)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return image


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, side: int, color: tuple[int, ...], tilt: float) -> None:
    x, y, r = thing.x * side, thing.y * side, thing.radius * side
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
        return
    pen.polygon([_turn(px, py, tilt, x, y, r) for px, py in OUTLINES[thing.shape]], fill=color)


def _turn(px: float, py: float, tilt: float, x: float, y: float, r: float) -> tuple[float, float]:
    c, s = math.cos(tilt), math.sin(tilt)
    return x + r * (c * px - s * py), y + r * (s * px + c * py)


ARM = 0.32
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (0.95, 0.75), (-0.95, 0.75)],
    "cross": [
        (-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
        (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM),
    ],
}  # fmt: skip
