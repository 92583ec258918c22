"""Examples for the page, from a folder or from the data that the model was trained or evaluated on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmphi.errors import DataError

if TYPE_CHECKING:
    from mlflow.entities import Run

    from mmphi.tracking.run_writer import TrackingStore

IMAGES, SOUNDS = (".png", ".jpg", ".jpeg", ".webp"), (".wav", ".mp3", ".flac", ".ogg", ".m4a")
MOST = 8
RUN_ID = re.compile("[0-9a-f]{32}")

Example = list[str | None]  # Text, path of an image, path of a recording.


def of_folder(folder: Path) -> list[Example]:
    """Up to :data:`MOST` examples of a folder; ``a.jpg``, ``a.mp3`` and the question in ``a.txt`` are one example.

    Raises:
        DataError: If it contains none.
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
    """Test images of the ``scenes`` stage, each with one of its questions; the kinds of questions alternate."""
    records: list[dict[str, Any]] = json.loads((folder / "test.json").read_text())
    by_image: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_image.setdefault(record["image"], []).append(record)
    examples: list[Example] = []
    for number, (image, own) in enumerate(list(by_image.items())[:MOST]):
        question = str(own[number % len(own)]["conversations"][0]["value"])
        examples.append([question.replace("<image>", "").strip(), str(folder / "images" / image), None])
    return examples


def of_predictions(folder: Path) -> list[Example]:
    """Test images from an evaluation's table of predictions, without a question.

    Args:
        folder: Folder of the evaluation's run.
    """
    for table in sorted(folder.glob("*_predictions.json")):
        content = json.loads(table.read_text())
        if "image" in content.get("columns", ()):
            column = content["columns"].index("image")
            files = [row[column].get("filepath", "") for row in content["data"][:MOST] if isinstance(row[column], dict)]
            return [["", str(folder / file), None] for file in files if file and (folder / file).is_file()]
    return []


def of_model(model: str) -> list[Example]:
    """Examples from the data that a model was trained or evaluated on.

    Args:
        model: Folder, run ID or registered name.

    Returns:
        Scenes with questions for a model of drawn scenes, test images for others; none if the store has none.
    """
    from mmphi.tracking.run_writer import TrackingStore

    store = TrackingStore()
    run = _run(store, model)
    if run is None:
        return []
    if run.data.tags.get("mmphi.stage") == "pretrain":
        return []  # It takes no image.
    scenes = _upstream_scenes(store, run)
    if scenes is not None:
        return of_scenes(store.fetch(scenes))
    evaluated = _run(store, run.data.tags.get("mmphi.then.evaluate", ""))
    return of_predictions(store.fetch(evaluated)) if evaluated is not None else []


def _upstream_scenes(store: TrackingStore, run: Run) -> Run | None:
    """Run of the scenes that a model, or the model it was built from, was trained on."""
    scenes = _run(store, run.data.tags.get("mmphi.upstream.scenes", ""))
    if scenes is not None:
        return scenes
    for stage in ("qlora", "projector", "merge"):
        model = _run(store, run.data.tags.get(f"mmphi.upstream.{stage}", ""))
        if model is not None:
            return _upstream_scenes(store, model)
    return None


def _run(store: TrackingStore, name: str) -> Run | None:
    """A run of the store; ``None`` for a folder, a registered name, or a deleted run."""
    if RUN_ID.fullmatch(name):
        return store.run_if_there(name)
    return None
