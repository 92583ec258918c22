from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmphi.data.images import open_image, resolve_inside
from mmphi.errors import ImageError


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def reason(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(path)
    return caught.value.reason


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


def test_good_image_is_itself(tmp_path):
    image = noise()
    assert np.array_equal(np.asarray(open_image(save(tmp_path / "a.png", image))), np.asarray(image))


def test_missing_empty_and_foreign_files(tmp_path):
    assert reason(tmp_path / "none.jpg") == "missing image"
    (tmp_path / "empty.jpg").touch()
    assert reason(tmp_path / "empty.jpg") == "empty image file"
    (tmp_path / "text.jpg").write_text("not an image at all")
    assert reason(tmp_path / "text.jpg") == "not an image"
    save(tmp_path / "a.ppm", noise())
    assert reason(tmp_path / "a.ppm") == "not an image"  # a format not wanted


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_truncated(tmp_path, kind):
    path = save(tmp_path / f"a.{kind}", noise(200, 200))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert reason(path) in ("truncated or broken image", "not an image")


def test_bomb(tmp_path):
    """A PNG whose header promises more pixels than memory should hold; only the header is ever read."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert reason(tmp_path / "bomb.png") == "too many pixels"


def test_other_modes_become_rgb(tmp_path):
    image = noise()
    for mode, suffix in (("L", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("LA", "png"), ("YCbCr", "jpg")):
        opened = open_image(save(tmp_path / f"{mode}.{suffix}", image.convert(mode)))
        assert (opened.mode, opened.size) == ("RGB", image.size)
    deep = Image.fromarray(np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10))
    grey = np.asarray(open_image(save(tmp_path / "deep.png", deep)))
    assert grey.min() == 0
    assert grey.max() == 255


def test_transparency_is_laid_on_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(save(tmp_path / "a.png", clear)).getpixel((0, 0)) == (255, 255, 255)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((0, 0))[0] > 200


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert open_image(save(tmp_path / "a.jpg", noise(40, 30), exif=exif)).size == (30, 40)


def test_paths_stay_inside(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.jpg").touch()
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    assert resolve_inside(folder, "a/b.jpg") == folder / "a/b.jpg"
    for bad in ("../secret.jpg", str(tmp_path / "secret.jpg"), "a/../../secret.jpg", "link.jpg"):
        with pytest.raises(ImageError, match="leads out"):
            resolve_inside(folder, bad)
