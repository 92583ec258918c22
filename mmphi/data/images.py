"""Opens untrusted image files: supported formats only, complete, upright, in RGB."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import re
import stat
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from mmphi.data.schema import ImageRef
from mmphi.errors import ImageError

URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
COCO_NAME = re.compile(r"(?:.*/)?(?:COCO_(?:train|val)2014_)?(?P<number>\d{12})\.jpg")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# Brand in the first box of a file: other formats that phones and browsers write.
BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"
)
DEPTHS = (8, 10, 12, 14, 16)  # Bit depths in 16-bit images of cameras and scanners; the smallest that fits is assumed.
PNG = b"\x89PNG\r\n\x1a\n"
METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # Metadata chunks of a PNG; Pillow reads at most 1 MB of them.
MAX_FILE_BYTES = 100 * 1024**2
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485

# Exceptions that Pillow's decoders raise for damaged files, found by changing random bytes.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, OverflowError, struct.error, zlib.error)


def resolve_inside(folder: Path, relative: str) -> Path:
    """Returns the resolved path of an image that must be inside its folder.

    Raises:
        ImageError: If the path is malformed or leads out of the folder, by ``..``, as an absolute path or by a symbolic
            link.
    """
    return Path(_inside(os.path.realpath(folder), relative))


def _inside(root: str, relative: str) -> str:
    """:func:`resolve_inside` for a resolved folder; uses strings for speed, as there may be a million paths.

    Raises:
        ImageError: As in :func:`resolve_inside`.
    """
    try:
        path = os.path.realpath(os.path.join(root, relative))  # noqa: PTH118  # Strings: three times as fast.
    except (OSError, ValueError) as error:  # A NUL or a lone surrogate.
        raise ImageError("malformed path", f"{relative!r} is no path: {error}") from error
    if path != root and not path.startswith(root.rstrip(os.sep) + os.sep):
        raise ImageError("path leaves the image folder", f"{relative!r} leads out of {root}")
    return path


class ImageFolder:
    """The image files of one source.

    Args:
        folder: Folder that paths are relative to.
        source: Name of the source; prefix of image ids.
        note: Called with the source and a message if an image is found in another layout than the data states.
    """

    def __init__(self, folder: Path, source: str, note: Callable[[str, str], None] = lambda *_: None) -> None:
        self.folder = folder.resolve()
        self._root = os.path.realpath(folder)
        self.source, self.note = source, note
        self._known: dict[str, ImageRef] = {}

    def find(self, relative: str) -> ImageRef:
        """Returns an image by its path in the data; all spellings of a file's path give the same id.

        Raises:
            ImageError: If the image is missing, outside the folder, or a URL.
        """
        if relative not in self._known:
            path = self._file(relative)
            if path is None:
                raise ImageError("missing image", f"{relative} is not in {self.folder}")
            inside = path[len(self._root) :].lstrip(os.sep).replace(os.sep, "/")
            self._known[relative] = ImageRef(f"{self.source}/{inside}", Path(path))
        return self._known[relative]

    def _file(self, relative: str) -> str | None:
        if URL.match(relative):
            raise ImageError("the image is a URL", f"{relative} is not fetched: give the path of a file")
        path = _inside(self._root, relative)
        try:
            if stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  # Strings, as above.
                return path
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:  # A name that is too long for the file system.
            raise ImageError("malformed path", f"{relative!r} is no path: {error.strerror}") from error
        for layout, name in (*other_spellings(relative), *coco_names(relative)):
            path = _inside(self._root, name)
            if os.path.isfile(path):  # noqa: PTH113  # Strings, as above.
                self.note(self.source, f"images found as {layout}")
                return path
        return None


def other_spellings(relative: str) -> Iterator[tuple[str, str]]:
    """Yields other spellings of a path, each after its description: backslashes, other Unicode normal forms."""
    slashed = relative.replace("\\", "/")
    if slashed != relative:
        yield "a path with backslashes", slashed
    for form in ("NFC", "NFD"):  # A Mac decomposes accented letters in file names.
        normal = unicodedata.normalize(form, slashed)
        if normal not in (relative, slashed):
            yield f"a name in the Unicode form {form}", normal


def coco_names(relative: str) -> Iterator[tuple[str, str]]:
    """Yields other names of a COCO image, each after its layout: the same picture has several names in practice.

    ``llava_instruct_150k.json`` has ``000000033471.jpg``, ``llava_v1_5_mix665k.json`` has
    ``coco/train2017/000000033471.jpg``, and the folders of 2014 hold ``COCO_train2014_000000033471.jpg``.
    """
    match = COCO_NAME.fullmatch(relative)
    if match is None:
        return
    number = match.group("number")
    for layout in ("NUMBER.jpg", "train2017/NUMBER.jpg", "coco/train2017/NUMBER.jpg", "val2017/NUMBER.jpg"):
        yield layout, layout.replace("NUMBER", number)
    for year in ("train2014", "val2014"):
        for folder in ("", f"{year}/", f"coco/{year}/"):
            layout = f"{folder}COCO_{year}_NUMBER.jpg"
            yield layout, layout.replace("NUMBER", number)


def open_image(source: Path | bytes, name: str = "") -> Image.Image:
    """Read a complete image.

    Args:
        source: Path of a file, or its content.
        name: Name in error messages; by default the path of the file.

    Returns:
        The first frame, in RGB, rotated according to its EXIF orientation, with transparency on white.

    Raises:
        ImageError: If the image is missing, empty, truncated, too large, or has an unsupported format.
    """
    if isinstance(source, bytes):
        return image_in(source, name or "the image")
    return image_in(image_bytes(source), name or str(source))


def image_bytes(path: Path) -> bytes:
    """Returns the content of an image file.

    Raises:
        ImageError: If the file is missing, empty, unreadable or too large.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ImageError("missing image", f"{path} cannot be read: {error.strerror}") from error
    if size == 0:
        raise ImageError("empty image file", f"{path} has no bytes")
    if size > MAX_FILE_BYTES:
        raise ImageError(
            "image file too large", f"{path} has {size / 1e6:.0f} MB; the most is {MAX_FILE_BYTES / 1e6:.0f} MB"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError("truncated or broken image", f"{path}: {error}") from error


def image_in(content: bytes, name: str) -> Image.Image:
    """Decode the content of an image file; the result is that of :func:`open_image`.

    Args:
        content: Content of the file.
        name: Name in error messages.

    Raises:
        ImageError: If the image is truncated, too large, or has an unsupported format.
    """
    brand = BRANDS.get(content[8:12], "") if content[4:8] == b"ftyp" else ""
    if brand == "HEIC" and any(BRANDS.get(content[i : i + 4]) == "AVIF" for i in range(16, 48, 4)):
        brand = "AVIF"  # One of the compatible brands.
    if brand == "HEIC" and not _reads_heic():
        raise ImageError("HEIC is not supported", f"{name} is HEIC: convert it to JPEG, or install pillow-heif")
    if brand == "AVIF" and not features.check("avif"):
        raise ImageError("AVIF is not supported", f"{name} is AVIF: convert it to JPEG, or install a newer Pillow")
    try:
        try:
            return _opened(content, name)
        except BROKEN:
            plain = without_metadata(content)
            if plain is None:
                raise
            return _opened(plain, name)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError("too many pixels", f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image", f"{name} is none of {', '.join(FORMATS)}") from error
    except BROKEN as error:
        raise ImageError("truncated or broken image", f"{name}: {error}") from error


def _opened(content: bytes, name: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Warnings about metadata are irrelevant here.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=[*FORMATS, *(["HEIF"] if _reads_heic() else [])]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError("too many pixels", f"{name} has {image.width} x {image.height} pixels")
            image.load()
            return _rgb(_upright(image))


@cache
def _reads_heic() -> bool:
    """Whether Pillow can read HEIC, which requires the package pillow-heif; registers its plugin."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    importlib.import_module("pillow_heif").register_heif_opener()
    return True


def without_metadata(content: bytes) -> bytes | None:
    """Returns a PNG without text chunks and colour profile; ``None`` if it has none, or is not a complete PNG."""
    if not content.startswith(PNG):
        return None
    kept, place, dropped = [PNG], len(PNG), False
    while place + 12 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        end = place + 12 + length
        if content[place + 4 : place + 8] in METADATA:
            dropped = True
        else:
            kept.append(content[place:end])
        place = end
    return b"".join(kept) if dropped and place == len(content) else None


def as_rgb(image: Image.Image) -> Image.Image:
    """Converts an open image as :func:`open_image` does: upright, transparency on white, 16 bits scaled."""
    return _rgb(_upright(image.copy()))


def _upright(image: Image.Image) -> Image.Image:
    """The image, rotated according to its EXIF orientation; damaged EXIF data is ignored."""
    with suppress(*BROKEN):
        ImageOps.exif_transpose(image, in_place=True)  # Without in_place, an upright image would be copied.
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image, np.float64)
        depth = next(bits for bits in DEPTHS if grey.max() < 2**bits)
        grey = grey * (255 / (2**depth - 1))
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        # 32-bit modes define no white level, so the values are stretched to the full range, as viewers do.
        grey = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        span = max(float(np.ptp(grey)), 1e-9)
        return Image.fromarray(((grey - grey.min()) * (255 / span)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
