"""LLaVA-Instruct JSON, as the real file is: ids of either type, rows without image, ``<image>`` at either end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmphi.data.images import resolve_inside
from mmphi.data.records import Example, ImageRef, ReadReport, Split, Turn
from mmphi.errors import DataError, ImageError

IMAGE_TOKEN = "<image>"


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: If it is missing, not UTF-8 or malformed; the line and column are named.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}", "mend the file there, or fetch it anew"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "check the path in data.sources") from error


def image_of(folder: Path, relative: str, source: str) -> ImageRef:
    """An image of a source, checked to exist inside its folder.

    Raises:
        ImageError: If it is missing or lies outside.
    """
    path = resolve_inside(folder, relative)
    if not path.is_file():
        raise ImageError("missing image", f"{relative} is not in {folder}")
    return ImageRef(f"{source}/{Path(relative).as_posix()}", path)


def read_llava(path: Path, images: Path, source: str, report: ReadReport, split: Split = "train") -> Iterator[Example]:
    """Read conversations, counting the rows that cannot be used.

    Args:
        path: The JSON file: a list of ``{"id", "image", "conversations": [{"from", "value"}, ...]}``.
        images: Folder that image paths are relative to.
        source: Name of the source.
        report: Counts what was kept and dropped.
        split: Given to every example; the split by image comes later where the source has none of its own.

    Raises:
        DataError: If the file is no JSON list.
    """
    rows = load_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}, not a list of conversations")
    for number, row in enumerate(rows):
        where = f"{path.name}, row {number}"
        try:
            example = _example(row, number, images, source, split)
        except ImageError as error:
            report.drop(source, where, error.reason)
        except DataError as error:
            report.drop(source, where, error.what)
        else:
            report.keep(source)
            yield example


def _example(row: Any, number: int, images: Path, source: str, split: Split) -> Example:
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise DataError("malformed row")
    turns = []
    said = row["conversations"]
    for human, model in zip(said[::2], said[1::2], strict=False):
        try:
            if human["from"] != "human" or model["from"] != "gpt":
                raise DataError("turns out of order")
            question, answer = human["value"], model["value"]
            turns.append(Turn(question.replace(IMAGE_TOKEN, "").strip(), answer.strip()))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError("malformed turn") from error
    if not turns:
        raise DataError("no answered question")
    image = row.get("image")
    if image is not None and not isinstance(image, str):
        raise DataError("malformed row")
    ref = image_of(images, image, source) if image else None
    attributes = row.get("attributes") or {}
    return Example(str(row.get("id", number)), ref, tuple(turns), source, split, attributes)
