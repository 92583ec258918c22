from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmphi.data.images import MAX_FILE_BYTES, ImageFolder, as_rgb, open_image, resolve_inside
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


def test_sixteen_bits_keep_their_brightness(tmp_path):
    deep = Image.fromarray(np.linspace(0, 32767, 100).astype(np.uint16).reshape(10, 10))
    grey = np.asarray(open_image(save(tmp_path / "deep.png", deep)))
    assert (grey.min(), grey.max()) == (0, 127)
    flat = Image.fromarray(np.full((10, 10), 65535, np.uint16))
    assert np.asarray(open_image(save(tmp_path / "flat.png", flat))).min() == 255


@pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
def test_fewer_bits_in_sixteen_are_not_black(tmp_path, depth):
    deep = Image.fromarray(np.linspace(0, 2**depth - 1, 100).astype(np.uint16).reshape(10, 10))
    for name in ("deep.png", "deep.tif"):
        grey = np.asarray(open_image(save(tmp_path / name, deep)))[..., 0].flatten()
        assert np.abs(grey - np.linspace(0, 255, 100)).max() <= 1


def test_texts_and_profiles_of_any_size_spoil_no_png(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    plain = save(tmp_path / "a.png", noise()).read_bytes()
    huge = zlib.compress(bytes(3_000_000))
    for extra in (chunk(b"zTXt", b"Comment\0\0" + huge), chunk(b"iCCP", b"profile\0\0" + huge)):
        (tmp_path / "b.png").write_bytes(plain[:33] + extra + plain[33:])
        with pytest.raises(ValueError, match=r"too large|MAX_TEXT"):
            Image.open(tmp_path / "b.png").load()
        assert np.array_equal(np.asarray(open_image(tmp_path / "b.png")), np.asarray(noise()))
        (tmp_path / "c.png").write_bytes((plain[:33] + extra + plain[33:])[:-200])
        assert reason(tmp_path / "c.png") == "truncated or broken image"


def test_avif_is_read_and_heic_is_called_what_it_is(tmp_path):
    soft = noise(4, 3).resize((64, 64), Image.Resampling.BICUBIC)
    read = np.asarray(open_image(save(tmp_path / "a.avif", soft, quality=95)), float)
    assert np.abs(read - np.asarray(soft, float)).mean() < 12
    (tmp_path / "phone.jpg").write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(99))
    assert reason(tmp_path / "phone.jpg") == "HEIC is not supported"


def test_thirty_two_bits_are_stretched(tmp_path):
    real = np.linspace(-1, 1, 100, dtype=np.float32).reshape(10, 10)
    real[0, 0] = np.nan
    grey = np.asarray(open_image(save(tmp_path / "real.tif", Image.fromarray(real))))
    assert (grey.min(), grey.max()) == (0, 255)


def test_transparency_is_laid_on_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(save(tmp_path / "a.png", clear)).getpixel((0, 0)) == (255, 255, 255)


def test_an_image_that_is_open_becomes_what_its_file_would(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10))
    clear = noise().convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    for number, (image, how) in enumerate([(noise(), {}), (clear, {}), (deep, {}), (noise(40, 30), {"exif": exif})]):
        path = save(tmp_path / f"{number}.png", image, **how)
        with Image.open(path) as opened:
            before = opened.tobytes()
            assert np.array_equal(np.asarray(as_rgb(opened)), np.asarray(open_image(path)))
            assert opened.tobytes() == before


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((0, 0))[0] > 200


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert open_image(save(tmp_path / "a.jpg", noise(40, 30), exif=exif)).size == (30, 40)


def test_damaged_exif_spoils_no_picture(tmp_path):
    """An orientation, and a tag of a type that cannot be written back."""
    tiff = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2)
    tiff += struct.pack("<HHIHxx", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x0100, 4, 1, b"abcd") + b"\0" * 4
    damaged = tiff.replace(struct.pack("<HHI4s", 0x0100, 4, 1, b"abcd"), struct.pack("<HHI4s", 0x0100, 2, 4, b"abc\0"))
    image = noise(40, 30)
    for i, exif in enumerate((tiff, damaged, tiff[:20], b"Exif\0\0junk")):
        opened = open_image(save(tmp_path / f"{i}.jpg", image, exif=exif))
        assert sorted(opened.size) == [30, 40]


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_no_damage_raises_anything_else(tmp_path, kind):
    """Bytes changed at random: either a picture comes, or an ImageError with a reason."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    whole = save(tmp_path / f"whole.{kind}", noise(), exif=exif).read_bytes()
    rng = random.Random(0)
    outcomes = set()
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            content[rng.randrange(min(len(content), rng.choice((60, 300, 10**6))))] = rng.choice((0, 255, 128))
        (tmp_path / "damaged").write_bytes(content)
        try:
            outcomes.add(open_image(tmp_path / "damaged").mode)
        except ImageError as error:
            outcomes.add(error.reason)
    assert outcomes > {"RGB"}


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    assert reason(tmp_path / "a.png") == "image file too large"


def test_a_folder_is_no_image(tmp_path):
    assert reason(tmp_path) == "truncated or broken image"


def test_one_file_has_one_id_and_no_path_is_an_accident(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jpg").touch()
    folder = ImageFolder(tmp_path, "photos")
    assert {folder.find(p).id for p in ("a/b.jpg", "./a/b.jpg", "a/../a/b.jpg", "a//b.jpg")} == {"photos/a/b.jpg"}
    for bad, why in {"a\0b": "malformed path", "x" * 5000: "malformed path", "\ud800": "malformed path",
                     "": "missing image", "a": "missing image", "a/c.jpg": "missing image"}.items():  # fmt: skip
        with pytest.raises(ImageError) as caught:
            folder.find(bad)
        assert caught.value.reason == why


def test_paths_stay_inside(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.jpg").touch()
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    assert resolve_inside(folder, "a/b.jpg") == folder / "a/b.jpg"
    for bad in ("../secret.jpg", str(tmp_path / "secret.jpg"), "a/../../secret.jpg", "link.jpg"):
        with pytest.raises(ImageError, match="leads out"):
            resolve_inside(folder, bad)
