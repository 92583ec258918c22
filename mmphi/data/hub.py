"""Any dataset of the `datasets` library that has an image and a text column."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmphi.data.records import Example, ImageRef, ReadReport, Turn
from mmphi.errors import DataError


def read_dataset(
    name: str,
    split: str,
    source: str,
    report: ReadReport,
    *,
    image_column: str = "image",
    text_column: str = "caption",
    question: str = "",
    cache: Path | None = None,
) -> Iterator[Example]:
    """Read a dataset by hub name or local folder; a text column may hold one caption or a list of them.

    Images that lie in files are used where they are; others are written once, under the digest of their bytes.

    Args:
        name: Hub name, local folder, or folder written by ``save_to_disk``.
        split: Its split, ``train`` for example.
        source: Name of the source.
        report: Counts what was kept and dropped.
        image_column: Column of images.
        text_column: Column of captions.
        question: Put before every caption.
        cache: Where image bytes are written; the user's cache folder where left out.

    Raises:
        DataError: If the dataset cannot be had, or lacks a column.
    """
    import datasets

    try:
        if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
            loaded: Any = datasets.load_from_disk(name)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"the dataset {name!r}, split {split!r}, cannot be loaded: {str(error).splitlines()[0]}",
            "with no hub in reach, give a local folder: one with a metadata.csv, or one that save_to_disk wrote",
        ) from error
    for column in (image_column, text_column):
        if column not in rows.column_names:
            raise DataError(f"{name} has no column {column!r}; it has {', '.join(rows.column_names)}")
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmphi" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows.cast_column(image_column, datasets.Image(decode=False))):
        where = f"{name}, row {number}"
        image, texts = row[image_column], row[text_column]
        if not image or not (image.get("bytes") or image.get("path")):
            report.drop(source, where, "missing image")
            continue
        ref = ImageRef(f"{source}/{number:08d}", _file(image, folder))
        for i, text in enumerate(texts if isinstance(texts, list) else [texts]):
            report.keep(source)
            yield Example(f"{number}.{i}", ref, (Turn(question, str(text or "").strip()),), source)


def _file(image: dict[str, Any], folder: Path) -> Path:
    content = image.get("bytes")
    if content is None:
        return Path(image["path"])
    path = folder / hashlib.sha256(content).hexdigest()
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(content)
        part.rename(path)
    return path
