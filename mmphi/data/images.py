"""Opening images that others made: only the formats wanted, whole, upright, in RGB."""

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
# By the brand in the first box of a file: what else phones and browsers write.
BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"
)
DEPTHS = (8, 10, 12, 14, 16)  # Bits that cameras and scanners use of 16: an image is scaled by the fewest that hold it.
PNG = b"\x89PNG\r\n\x1a\n"
METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # Chunks of a PNG, of which Pillow reads 1 MB at most.
MAX_FILE_BYTES = 100 * 1024**2
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485

# What Pillow's decoders raise on damaged files, found by changing bytes at random.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, OverflowError, struct.error, zlib.error)


def resolve_inside(folder: Path, relative: str) -> Path:
    """The path of an image that must lie inside its folder.

    Raises:
        ImageError: If the path leads out of the folder, by ``..``, as an absolute path or by a symbolic link, or is
            no path at all.
    """
    return Path(_inside(os.path.realpath(folder), relative))


def _inside(root: str, relative: str) -> str:
    """:func:`resolve_inside` of a resolved folder; on strings, as there may be a million of them.

    Raises:
        ImageError: As of :func:`resolve_inside`.
    """
    try:
        path = os.path.realpath(os.path.join(root, relative))  # noqa: PTH118  # Strings: three times as fast.
    except (OSError, ValueError) as error:  # A NUL, half a surrogate pair.
        raise ImageError("malformed path", f"{relative!r} is no path: {error}") from error
    if path != root and not path.startswith(root.rstrip(os.sep) + os.sep):
        raise ImageError("path leaves the image folder", f"{relative!r} leads out of {root}")
    return path


class ImageFolder:
    """The image files of one source.

    Args:
        folder: What paths are relative to.
        source: Name of the source; ids begin with it.
        note: Told the source and in what layout an image was found, where that is not the one that the data says.
    """

    def __init__(self, folder: Path, source: str, note: Callable[[str, str], None] = lambda *_: None) -> None:
        self.folder = folder.resolve()
        self._root = os.path.realpath(folder)
        self.source, self.note = source, note
        self._known: dict[str, ImageRef] = {}

    def find(self, relative: str) -> ImageRef:
        """An image, by its path as the data says it; the same file has the same id however it is written.

        Raises:
            ImageError: If it is missing or lies outside.
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
        except OSError as error:  # A name longer than file systems take.
            raise ImageError("malformed path", f"{relative!r} is no path: {error.strerror}") from error
        for layout, name in (*other_spellings(relative), *coco_names(relative)):
            path = _inside(self._root, name)
            if os.path.isfile(path):  # noqa: PTH113  # Strings, as above.
                self.note(self.source, f"images found as {layout}")
                return path
        return None


def other_spellings(relative: str) -> Iterator[tuple[str, str]]:
    """The same path as other systems write it, each with what is different: backslashes, other Unicode normal forms."""
    slashed = relative.replace("\\", "/")
    if slashed != relative:
        yield "a path with backslashes", slashed
    for form in ("NFC", "NFD"):  # A Mac decomposes accented letters in file names.
        normal = unicodedata.normalize(form, slashed)
        if normal not in (relative, slashed):
            yield f"a name in the Unicode form {form}", normal


def coco_names(relative: str) -> Iterator[tuple[str, str]]:
    """Other names of an image of COCO, each with its layout: the same picture goes by several in the wild.

    ``llava_instruct_150k.json`` says ``000000033471.jpg``, ``llava_v1_5_mix665k.json``
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
    """Read an image whole.

    Args:
        source: Its file, or what that holds.
        name: What it is called in errors; the path of the file where left out.

    Returns:
        The first frame, in RGB, turned as its EXIF orientation says; transparency is laid on white.

    Raises:
        ImageError: If it is missing, empty, truncated, too large, or of no format wanted.
    """
    if isinstance(source, bytes):
        return image_in(source, name or "the image")
    return image_in(image_bytes(source), name or str(source))


def image_bytes(path: Path) -> bytes:
    """The content of an image file.

    Raises:
        ImageError: If it is missing, empty or too large.
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
    """The image that the content of a file is, as :func:`open_image` gives it.

    Args:
        content: Of the file.
        name: What it is called in errors.

    Raises:
        ImageError: If it is truncated, too large, or of no format wanted.
    """
    brand = BRANDS.get(content[8:12], "") if content[4:8] == b"ftyp" else ""
    if brand == "HEIC" and any(BRANDS.get(content[i : i + 4]) == "AVIF" for i in range(16, 48, 4)):
        brand = "AVIF"  # Of the brands that it is compatible with.
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
        warnings.simplefilter("ignore")  # What is odd about its metadata does not matter here.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=[*FORMATS, *(["HEIF"] if _reads_heic() else [])]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError("too many pixels", f"{name} has {image.width} x {image.height} pixels")
            image.load()
            return _rgb(_upright(image))


@cache
def _reads_heic() -> bool:
    """Whether Pillow reads HEIC: by the package pillow-heif, where it is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    importlib.import_module("pillow_heif").register_heif_opener()
    return True


def without_metadata(content: bytes) -> bytes | None:
    """A PNG without its texts and colour profile; ``None`` where it has none, or is no whole PNG."""
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
    """An image that is open already, as :func:`open_image` gives it: upright, transparency on white, 16 bits scaled."""
    return _rgb(_upright(image.copy()))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the EXIF says; a picture with damaged EXIF is still a picture."""
    with suppress(*BROKEN):
        ImageOps.exif_transpose(image, in_place=True)  # Else it copies what stands upright already.
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image, np.float64)
        depth = next(bits for bits in DEPTHS if grey.max() < 2**bits)
        grey = grey * (255 / (2**depth - 1))
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        # 32 bits have no white of their own: stretched over what they hold, as a viewer shows them.
        grey = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        span = max(float(np.ptp(grey)), 1e-9)
        return Image.fromarray(((grey - grey.min()) * (255 / span)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
