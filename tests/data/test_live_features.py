from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmphi.data import features
from mmphi.data.features import LOOKED, LiveFeatures
from mmphi.data.records import ImageRef
from mmphi.errors import ImageError


class Mean:
    """A tower whose one feature of an image is its mean colour."""

    tokens, width, digest = 1, 3, "mean"

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32)).permute(2, 0, 1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(2, 3))[:, None]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every image file that is opened."""
    found: list[Path] = []
    real = features.open_image

    def noted(path: Path) -> Image.Image:
        found.append(path)
        return real(path)

    monkeypatch.setattr(features, "open_image", noted)
    return found


def image(path: Path, colour: tuple[int, int, int]) -> ImageRef:
    Image.new("RGB", (4, 4), colour).save(path)
    return ImageRef(path.name, path)


def test_what_was_looked_at_is_not_decoded_again(tmp_path: Path, opened: list[Path]) -> None:
    live = LiveFeatures(Mean())
    red, blue = image(tmp_path / "red.png", (200, 0, 0)), image(tmp_path / "blue.png", (0, 0, 100))
    live.look([red])
    assert live.get([red, blue]).tolist() == [[[200, 0, 0]], [[0, 0, 100]]]
    assert live.rows([red]).tolist() == [[200, 0, 0]]
    assert opened == [red.path, blue.path]


def test_another_file_of_that_name_is_seen_as_it_is(tmp_path: Path, opened: list[Path]) -> None:
    live = LiveFeatures(Mean())
    shown = image(tmp_path / "a.png", (200, 0, 0))
    live.look([shown])
    image(tmp_path / "a.png", (0, 0, 100))
    os.utime(shown.path, ns=(1, 1))
    assert live.get([shown]).tolist() == [[[0, 0, 100]]]
    shown.path.unlink()
    with pytest.raises(ImageError, match=r"a\.png"):
        live.get([shown])
    with pytest.raises(ImageError, match=r"a\.png"):
        live.look([shown])


def test_few_are_kept(tmp_path: Path, opened: list[Path]) -> None:
    live = LiveFeatures(Mean())
    shown = [image(tmp_path / f"{number}.png", (number, 0, 0)) for number in range(LOOKED + 1)]
    live.look(shown)
    live.get(shown)
    assert len(opened) == LOOKED + 2
