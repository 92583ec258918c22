"""Images of any shape become pixels without more memory than their content needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from mmphi.models.vision.preprocess import LONGEST_SIDE, Preprocess

SIZE = 32


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def resized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pixels of every image that is resized to."""
    found: list[int] = []
    real = Image.Image.resize

    def noted(image: Image.Image, size: tuple[int, int], *how: Any, **more: Any) -> Image.Image:
        found.append(size[0] * size[1])
        return real(image, size, *how, **more)

    monkeypatch.setattr(Image.Image, "resize", noted)
    return found


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (2, 60_000)])
def test_a_line_is_not_enlarged_to_gigabytes(mode: str, shape: tuple[int, int], resized: list[int]) -> None:
    pixels = Preprocess(PreprocessCfg(size=SIZE, resize_mode=mode))(picture(*shape))
    assert tuple(pixels.shape) == (3, SIZE, SIZE)
    assert max(resized, default=0) <= LONGEST_SIDE * SIZE**2


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (10, 10 * LONGEST_SIDE)])
def test_other_images_are_as_open_clip_has_them(mode: str, shape: tuple[int, int]) -> None:
    config = PreprocessCfg(size=SIZE, resize_mode=mode)
    transform = image_transform_v2(config, is_train=False)
    expected = np.asarray(transform.transforms[0](picture(*shape)))
    for step in transform.transforms[1:-2]:
        expected = np.asarray(step(Image.fromarray(expected)))
    found = Preprocess(config)(picture(*shape)).permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected)


def test_of_a_line_the_middle_is_seen() -> None:
    image = picture(2, 2000)
    middle = image.crop((0, 984, 2, 1016))
    preprocess = Preprocess(PreprocessCfg(size=SIZE))
    assert np.array_equal(preprocess(image), preprocess(middle))
