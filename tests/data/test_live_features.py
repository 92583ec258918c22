from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmphi.data import features
from mmphi.data.features import LOOKED, CachedFeatures, LiveFeatures
from mmphi.data.schema import ImageRef
from mmphi.errors import ImageError
from mmphi.generation.messages import image_from_memory


class Mean:
    """An encoder whose one feature of an image is its mean colour."""

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

    def noted(source: Path, name: str) -> Image.Image:
        found.append(source)
        return real(source, name)

    monkeypatch.setattr(features, "open_image", noted)
    return found


def image(path: Path, colour: tuple[int, int, int]) -> ImageRef:
    Image.new("RGB", (4, 4), colour).save(path)
    return ImageRef(path.name, path)


def sent(colour: tuple[int, int, int]) -> ImageRef:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return image_from_memory(buffer.getvalue())


def test_what_was_looked_at_is_not_computed_again(tmp_path: Path, opened: list[Path]) -> None:
    live = LiveFeatures(Mean())
    red, blue = sent((200, 0, 0)), image(tmp_path / "blue.png", (0, 0, 100))
    live.look([red, red])
    live.look([red])
    assert live.get([red, blue]).tolist() == [[[200, 0, 0]], [[0, 0, 100]]]
    assert live.rows([red]).tolist() == [[200, 0, 0]]
    assert opened == [red.content, blue.path]


def test_features_of_an_encoder_in_memory_are_computed_once(opened: list[Path]) -> None:
    live = CachedFeatures(Mean())
    red = sent((200, 0, 0))
    live.look([red])
    assert live.get([red]).tolist() == [[[200, 0, 0]]]
    assert len(opened) == 1


def test_another_file_of_that_name_is_seen_as_it_is(tmp_path: Path, opened: list[Path]) -> None:
    live = LiveFeatures(Mean())
    shown = image(tmp_path / "a.png", (200, 0, 0))
    assert live.get([shown]).tolist() == [[[200, 0, 0]]]
    image(tmp_path / "a.png", (0, 0, 100))
    assert live.get([shown]).tolist() == [[[0, 0, 100]]]
    shown.path.unlink()
    with pytest.raises(ImageError, match=r"a\.png"):
        live.get([shown])


def test_few_are_kept(opened: list[Path]) -> None:
    live = LiveFeatures(Mean())
    shown = [sent((number, 0, 0)) for number in range(LOOKED + 1)]
    live.look(shown)
    assert live.get(shown)[:, 0, 0].tolist() == list(range(LOOKED + 1))
    assert len(opened) == LOOKED + 2


def test_looking_can_be_ended_before_each_image(opened: list[Path]) -> None:
    live = LiveFeatures(Mean())

    def check() -> None:
        if opened:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        live.look([sent((1, 0, 0)), sent((2, 0, 0))], check)
    assert len(opened) == 1
