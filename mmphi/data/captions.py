"""Readers of captions: a CSV of images and captions, and the JSON of Karpathy's splits."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from mmphi.data.images import ImageFolder
from mmphi.data.json_rows import load_json, text_of
from mmphi.data.schema import Example, ReadReport, Split, Turn
from mmphi.errors import DataError, ImageError

DELIMITERS = ",;\t"
KARPATHY: dict[str, Split] = {"train": "train", "restval": "train", "val": "validation", "test": "test"}


def read_captions(
    path: Path,
    images: Path,
    source: str,
    report: ReadReport,
    *,
    image_column: str = "image",
    text_column: str = "caption",
    question: str = "",
) -> Iterator[Example]:
    """Read a CSV with a header and one caption per row; the delimiter is a comma, a semicolon or a tab.

    Raises:
        DataError: If the file cannot be read or lacks a column.
    """
    folder = ImageFolder(images, source, report.note)
    last_line = 1
    try:
        with io.StringIO(text_of(path), newline="") as file:
            # Strict: an unclosed quote would otherwise turn the rest of the file into one caption.
            rows = csv.DictReader(file, strict=True, delimiter=_delimiter(file, {image_column, text_column}))
            missing = {image_column, text_column} - set(rows.fieldnames or ())
            if missing:
                have = ", ".join(rows.fieldnames or ()) or "nothing"
                raise DataError(
                    f"{path} has no column {sorted(missing)[0]!r}; it has {have}",
                    "name its columns in image_column and text_column of the source",
                )
            for row in rows:
                last_line = rows.line_num
                where = f"{path.name}, line {rows.line_num}"
                image, caption = row[image_column], row[text_column]
                if image is None or caption is None:
                    report.drop(source, where, "malformed row")
                    continue
                if None in row:
                    report.drop(source, where, "more values than columns (a comma without quotes)")
                    continue
                if not caption.strip():
                    report.drop(source, where, "empty caption")
                    continue
                try:
                    ref = folder.find(image)
                except ImageError as error:
                    report.drop(source, where, error.reason)
                    continue
                report.keep(source)
                yield Example(str(rows.line_num), (ref,), (Turn(question, caption.strip()),), source)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {last_line + 1} and after: {error}", "put quotes around a caption, and double those inside"
        ) from error


def _delimiter(file: io.StringIO, columns: set[str]) -> str:
    """Delimiter of a header; a comma if none yields the requested columns."""
    header = file.readline()
    file.seek(0)
    for delimiter in DELIMITERS:
        if columns <= set(next(csv.reader([header], delimiter=delimiter), [])):
            return delimiter
    return DELIMITERS[0]


def read_karpathy(
    path: Path, images: Path, source: str, report: ReadReport, *, question: str = ""
) -> Iterator[Example]:
    """Read a file such as ``dataset_flickr8k.json``, with its splits (Karpathy and Fei-Fei 2015).

    Raises:
        DataError: If the file has another format.
    """
    content = load_json(path)
    rows = content.get("images") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{path} has no list called 'images'", "Karpathy's files have one")
    folder = ImageFolder(images, source, report.note)
    for number, row in enumerate(rows):
        where = f"{path.name}, image {number + 1}"
        try:
            split = KARPATHY[row["split"]]
            relative = "/".join(filter(None, (row.get("filepath"), row["filename"])))
            captions = [str(sentence["raw"]) for sentence in row["sentences"]]
            ref = folder.find(relative)
        except (KeyError, TypeError, AttributeError):
            report.drop(source, where, "malformed row")
        except ImageError as error:
            report.drop(source, where, error.reason)
        else:
            for i, caption in enumerate(captions):
                report.keep(source)
                yield Example(f"{number}.{i}", (ref,), (Turn(question, caption.strip()),), source, split)
