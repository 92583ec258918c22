"""Examples at hand for the page: of a folder, or drawn scenes of the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmphi.errors import DataError

IMAGES, SOUNDS = (".png", ".jpg", ".jpeg", ".webp"), (".wav", ".mp3", ".flac", ".ogg", ".m4a")
MOST = 8

Example = list[str | None]  # What is typed, an image, a recording.


def of_folder(folder: Path) -> list[Example]:
    """Images and recordings of a folder; ``a.jpg``, ``a.mp3`` and the question in ``a.txt`` are one example.

    Raises:
        DataError: If it holds none.
    """
    found: dict[str, Example] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        kind = path.suffix.lower()
        example = found.setdefault(path.stem, ["", None, None])
        if kind == ".txt":
            example[0] = path.read_text().strip()
        elif kind in IMAGES:
            example[1] = str(path)
        elif kind in SOUNDS:
            example[2] = str(path)
    examples = [example for example in found.values() if any(example)]
    if not examples:
        raise DataError(
            f"{folder} holds no examples",
            f"put images ({', '.join(IMAGES)}) and recordings ({', '.join(SOUNDS)}) there",
        )
    return examples[:MOST]


def of_scenes(folder: Path) -> list[Example]:
    """Test images of the ``scenes`` stage, each with one of its questions, of one kind after the other."""
    records: list[dict[str, Any]] = json.loads((folder / "test.json").read_text())
    by_image: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_image.setdefault(record["image"], []).append(record)
    examples: list[Example] = []
    for number, (image, own) in enumerate(list(by_image.items())[:MOST]):
        question = str(own[number % len(own)]["conversations"][0]["value"])
        examples.append([question.replace("<image>", "").strip(), str(folder / "images" / image), None])
    return examples


def of_store() -> list[Example]:
    """Of the newest ``scenes`` in the store; none where it has none."""
    from mmphi.tracking.store import Store

    store = Store()
    run = store.newest("scenes")
    return of_scenes(store.fetch(run)) if run is not None else []
