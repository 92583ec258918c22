"""Reads LLaVA-Instruct JSON with its irregularities: ids of either type, rows without image, ``<image>`` at either end.

A row may also have several images, as in LLaVA-NeXT-Interleave and Mantis: ``image`` is then a list. Other formats of
rows are described in :mod:`mmphi.data.turns`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmphi.data.images import ImageFolder
from mmphi.data.json_rows import load_json
from mmphi.data.llava_row_types import row_type
from mmphi.data.schema import Example, ReadReport, Split
from mmphi.data.turns import parse_row
from mmphi.errors import DataError, ImageError


def read_llava(path: Path, images: Path, source: str, report: ReadReport, split: Split = "train") -> Iterator[Example]:
    """Read conversations, and count the rows that cannot be used.

    Args:
        path: A list of ``{"id", "image", "conversations": [{"from", "value"}, ...]}`` as JSON, or as JSON Lines.
        images: Folder that image paths are relative to.
        source: Name of the source.
        report: Counts kept and dropped rows.
        split: Split of every example; a source without predefined splits is split by image later.

    Raises:
        DataError: If the file cannot be read or is not a list.
    """
    rows = load_json(path)
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds a {type(rows).__name__}, not a list of conversations",
            f"its keys are {', '.join(list(map(str, rows))[:8])}" if isinstance(rows, dict) else "",
        )
    folder, seen = ImageFolder(images, source, report.note), Counter[str]()
    rows.reverse()
    for number in range(len(rows)):
        row = rows.pop()  # Frees the memory of each row after use.
        name = row.get("id") if isinstance(row, dict) else None
        name = str(number if name is None else name)
        again = seen[name] + 1
        try:
            # LLaVA-Instruct-150k uses the image as id of a row, and has up to three rows per image.
            example = _example(row, name if again == 1 else f"{name}#{again}", folder, split)
        except ImageError as error:
            report.drop(source, f"{path.name}, row {number + 1}", error.reason)
        except DataError as error:
            report.drop(source, f"{path.name}, row {number + 1}", error.what)
        else:
            report.keep(source)
            seen[name] = again
            yield example


def _example(row: Any, name: str, folder: ImageFolder, split: Split) -> Example:
    found = parse_row(row, lambda text: folder.note(folder.source, text))
    attributes = row.get("attributes")
    return Example(
        id=name,
        images=tuple(folder.find(image) for image in found.images),
        turns=tuple(found.turns),
        source=folder.source,
        split=split,
        attributes={str(k): str(v) for k, v in attributes.items()}
        if isinstance(attributes, dict)
        else {"kind": row_type(found.turns)},
    )
