"""What is wrong with small data is reported before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmphi.cli import main
from mmphi.tracking.run_writer import TrackingStore


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.new("RGB", (32, 32), (20 * number, 5 * number, 90)).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


def settings(folder: Path, captions: list[str], extra: str = "") -> str:
    rows = "\n".join(f"{number}.png,{caption}" for number, caption in enumerate(captions))
    (folder / "captions.csv").write_text(f"image,caption\n{rows}\n")
    (folder / "mine.yaml").write_text(
        f"extends: tiny\ndata:\n  sources:\n    - {{kind: captions, path: captions.csv, images: images}}\n{extra}"
    )
    return str(folder / "mine.yaml")


def test_too_few_images_for_the_splits(photographs: Path, empty_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["projector", "--preset", settings(photographs, ["a cat"] * 12)]) == 2
    error = capsys.readouterr().err
    assert "validation and test take 100 + 100 images of 'captions', but it has 12 in all" in error
    assert "validation_images: 1\n    test_images: 1" in error
    assert not list(TrackingStore(empty_store).search())


def test_rows_without_a_caption(photographs: Path, empty_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    preset = settings(photographs, ["a cat"] * 11 + [""], "  validation_images: 1\n  test_images: 1\n")
    assert main(["projector", "--preset", preset]) == 2
    error = capsys.readouterr().err
    assert "8.3% of the rows cannot be used" in error
    assert "captions.csv, line 13" in error
    assert not list(TrackingStore(empty_store).search())
