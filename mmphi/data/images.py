"""Opening images that others made: only the formats wanted, whole, upright, in RGB."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmphi.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_FILE_BYTES = 100 * 1024**2
MAX_PIXELS = 100_000_000


def resolve_inside(folder: Path, relative: str) -> Path:
    """The path of an image that must lie inside its folder.

    Raises:
        ImageError: If the path leads out of the folder, by ``..``, as an absolute path or by a symbolic link.
    """
    root = folder.resolve()
    path = (root / relative).resolve()
    if not path.is_relative_to(root):
        raise ImageError("path leaves the image folder", f"{relative!r} leads out of {folder}")
    return path


def open_image(path: Path) -> Image.Image:
    """Read an image file whole.

    Returns:
        The first frame, in RGB, turned as its EXIF orientation says; transparency is laid on white.

    Raises:
        ImageError: If it is missing, empty, truncated, too large, or of no format wanted.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ImageError("missing image", f"{path} cannot be read: {error.strerror}") from error
    if size == 0:
        raise ImageError("empty image file", f"{path} has no bytes")
    if size > MAX_FILE_BYTES:
        raise ImageError("image file too large", f"{path} has {size / 1e6:.0f} MB; the most is 105 MB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError("too many pixels", f"{path} has {image.width} x {image.height} pixels")
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError("too many pixels", f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image", f"{path} is none of {', '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError("truncated or broken image", f"{path}: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit and float greys: stretched over what they hold, as a viewer shows them.
        grey = np.asarray(image, np.float64)
        span = max(float(np.ptp(grey)), 1e-9)
        return Image.fromarray(((grey - grey.min()) * (255 / span)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")
