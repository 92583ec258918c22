"""Small data files, and settings that name them."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from mmphi.config import DataSettings, SourceSettings


def photo_folder(folder: Path) -> Path:
    """Twenty images in ``images/``."""
    (folder / "images").mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "images" / f"{i}.png")
    return folder


def settings(folder: Path, *sources: dict, **data) -> DataSettings:
    full = [SourceSettings(**{"images": str(folder / "images"), **s}) for s in sources]
    return DataSettings(sources=full, **{"validation_images": 0, "test_images": 0, **data})


def llava_row(number, image="0.png", value="<image>\nwhat?", **changes):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "a thing"}]
    return {"id": number, "image": image, "conversations": turns, **changes}


def write(folder: Path, rows) -> dict:
    path = folder / "data.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return {"kind": "llava", "path": str(path)}


def captions(folder: Path, rows: list[tuple[str, str]], name="captions.csv", header="image,caption") -> dict:
    path = folder / name
    path.write_text("\n".join([header, *(f'{i},"{c}"' for i, c in rows)]))
    return {"kind": "captions", "path": str(path), "name": name.removesuffix(".csv")}
