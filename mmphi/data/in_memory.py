"""Training examples from Python objects: images in memory or files, with texts or conversations about them."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmphi.data.images import as_rgb
from mmphi.data.schema import Example, ImageRef, Split, Turn
from mmphi.data.turns import parse_row
from mmphi.errors import DataError, ImageError

if TYPE_CHECKING:
    import torch

SOURCE = "memory"
PIXELS = b"\x93NUMPY"  # Prefix of the content of a preprocessed pixel tensor.
FORMS = "(image, text), (image, question, answer), or a row with 'messages' or 'conversations'"


def image_reference(image: Any) -> ImageRef:
    """Returns a reference to an image.

    Args:
        image: A path, the bytes of an image file, a PIL image, or an array (H, W, 3) or (H, W) of uint8. A
            floating-point torch tensor (C, H, W) counts as preprocessed pixels.

    Raises:
        ImageError: If the image has another type, or its file does not exist.
    """
    if isinstance(image, ImageRef):
        return image
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise ImageError("missing image", f"there is no image {image}")
        return ImageRef(str(image), Path(image))
    content = image_content(image)
    return ImageRef(hashlib.sha256(content).hexdigest(), Path(), content=content)


def image_content(image: Any) -> bytes:
    """Returns the content of an image in memory, losslessly encoded.

    Args:
        image: As in :func:`image_reference`, except paths.

    Raises:
        ImageError: If the image has another type.
    """
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    buffer = io.BytesIO()
    torch = sys.modules.get("torch")  # Importing it takes seconds; if it is not imported, there is no tensor.
    if torch is not None and isinstance(image, torch.Tensor):
        if image.ndim != 3:
            raise ImageError("no image", f"pixels have shape (C, H, W), this tensor has {tuple(image.shape)}")
        if not image.is_floating_point():
            raise ImageError("no pixels", f"preprocessed pixels are floating point, this tensor is {image.dtype}")
        np.save(buffer, image.detach().float().cpu().numpy(), allow_pickle=False)
        return buffer.getvalue()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ImageError("no image", f"an array of an image is uint8, this one is {image.dtype}")
        try:
            image = Image.fromarray(image)
        except TypeError as error:
            raise ImageError("no image", f"an array of an image is (H, W, 3), this one is {image.shape}") from error
    if not isinstance(image, Image.Image):
        raise ImageError("no image", f"{type(image).__name__} is not a path, bytes, PIL image, array or tensor")
    as_rgb(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def pixels_in(content: Path | bytes) -> torch.Tensor | None:
    """Returns the pixels (C, H, W) of a tensor passed to :func:`image_reference`; ``None`` for any other image."""
    if not isinstance(content, bytes) or not content.startswith(PIXELS):
        return None
    import torch

    return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))


def examples_of(rows: Iterable[Any], split: Split | None = None) -> list[Example]:
    """Returns the examples of rows of Python objects.

    Args:
        rows: Each ``(image, text)`` (a caption), ``(image, question, answer)``, where image may be a list of images or
            ``None``; a mapping with OpenAI's ``messages`` or LLaVA's ``conversations``; or an
            :class:`~mmphi.data.schema.Example`.
        split: Split of the rows; by default ``train``, or the split of a row that is an ``Example``.

    Raises:
        DataError: If a row cannot be used; the message gives its number.
    """
    examples = []
    for number, row in enumerate(rows):
        try:
            example = row if isinstance(row, Example) else _example(row, str(number), split or "train")
            examples.append(replace(example, split=split) if split else example)
        except DataError as error:
            raise DataError(f"row {number}: {error.what}", error.hint) from error
    return examples


def _example(row: Any, name: str, split: Split) -> Example:
    if isinstance(row, Mapping):
        return _conversation(row, name, split)
    if not isinstance(row, Sequence) or isinstance(row, str | bytes) or len(row) not in (2, 3):
        raise DataError(f"a row is {FORMS}, not a {type(row).__name__}")
    question, answer = row[1:] if len(row) == 3 else ("", row[1])
    if not isinstance(question, str) or not isinstance(answer, str):
        raise DataError("questions and answers must be strings")
    if not answer.strip():
        raise DataError("the answer is empty")
    return Example(name, _images(row[0]), (Turn(question, answer),), SOURCE, split)


def _images(given: Any) -> tuple[ImageRef, ...]:
    if given is None:
        return ()
    return tuple(image_reference(each) for each in (given if isinstance(given, list | tuple) else [given]))


def _conversation(row: Mapping[str, Any], name: str, split: Split) -> Example:
    """Example of a row in LLaVA's or OpenAI's format, whose images may be objects.

    Raises:
        DataError: If the row cannot be used.
    """
    if odd := sorted({"audio", "audios"} & set(map(str, row))):
        raise DataError(f"rows with {odd[0]} are read by the stage `speech`, and not here")
    objects: dict[str, Any] = {}

    def placed(value: Any) -> Any:
        """Copy of a row with a name in place of each object."""
        if isinstance(value, Mapping):
            if value.get("type") == "image" and "image" in value:
                return {**value, "image": placed(value["image"])}
            return {key: placed(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [placed(each) for each in value]
        if value is None or isinstance(value, str | int | float | bool):
            return value
        key = f"object {len(objects)}"
        objects[key] = value
        return key

    notes: list[str] = []
    parsed = parse_row(placed(row), notes.append)
    if notes:
        raise DataError(notes[0])
    if unused := sorted(set(objects) - set(parsed.images)):
        raise DataError(f"a {type(objects[unused[0]]).__name__} in place of a text")
    images = tuple(image_reference(objects.get(image, image)) for image in parsed.images)
    return Example(str(row.get("id", name)), images, tuple(parsed.turns), SOURCE, split)
