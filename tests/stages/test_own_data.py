"""Stages on data of the user's own, of every kind of source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import small
from PIL import Image

COUNT = 12
SMALLER = {"light_clip__batch_size": "4", "projector__batch_size": "4", "qlora__batch_size": "4"}
Writing = Callable[[Path], dict[str, str]]


def photos(folder: Path) -> list[str]:
    (folder / "images").mkdir(parents=True)
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    return [f"{i}.png" for i in range(COUNT)]


def llava(folder: Path) -> dict[str, str]:
    turns = [
        {"from": "human", "value": "<image>\nDescribe the image concisely."},
        {"from": "gpt", "value": "a red thing"},
    ]
    rows = [{"id": name, "image": name, "conversations": turns} for name in photos(folder)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return {"kind": "llava", "path": str(folder / "rows.json")}


def captions(folder: Path) -> dict[str, str]:
    lines = [f"{name},a thing of number {i}" for i, name in enumerate(photos(folder))]
    (folder / "rows.csv").write_text("\n".join(["image,caption", *lines]))
    return {"kind": "captions", "path": str(folder / "rows.csv"), "question": "describe it"}


def karpathy(folder: Path) -> dict[str, str]:
    splits = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    rows = [
        {"filename": name, "split": split, "sentences": [{"raw": "a thing"}, {"raw": "one thing"}]}
        for name, split in zip(photos(folder), splits, strict=True)
    ]
    (folder / "rows.json").write_text(json.dumps({"images": rows}))
    return {"kind": "karpathy", "path": str(folder / "rows.json"), "question": "describe it"}


def saved(folder: Path) -> dict[str, str]:
    paths = [str(folder / "images" / name) for name in photos(folder)]
    rows = datasets.Dataset.from_dict({"image": paths, "caption": ["a thing"] * COUNT})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(folder / "saved"))
    return {"kind": "datasets", "path": str(folder / "saved"), "question": "describe it"}


def changes(write: Writing, folder: Path, **others: str) -> dict[str, str]:
    source = {**write(folder), "images": str(folder / "images")}
    held = {"data__validation_images": "2", "data__test_images": "2"}
    return {"data__sources": json.dumps([source]), **held, **SMALLER, **others}


@pytest.mark.slow
@pytest.mark.parametrize("write", [llava, captions, karpathy, saved])
def test_every_stage_reads_every_kind(write: Writing, small_chain: Path, tmp_path: Path) -> None:
    # What transformers' LLaVA has a counterpart of.
    exported = {"light_clip__from_nothing": "vit", "projector__norm": "false"}
    exported |= {"projector__width": "0", "projector__layers": "2"}
    own = changes(write, tmp_path / "data", **exported)
    with small.built("merge", small_chain, tmp_path / "store", **own) as pipeline:
        for stage in ("light_clip", "embed", "projector", "qlora", "merge"):
            assert pipeline.result(stage, small.settings(**own)).path.is_dir()
        assert (pipeline.build("export", small.settings(**own)).path / "config.json").is_file()
        measured = pipeline.build("evaluate", small.settings(**own, evaluate__stage="merge"))
        assert measured.metrics["test/loss"] > 0


def test_a_clip_is_trained_without_images_for_a_test(small_chain: Path, tmp_path: Path) -> None:
    own = changes(captions, tmp_path / "data") | {"data__test_images": "0"}
    with small.built("light_clip", small_chain, tmp_path / "store", **own) as pipeline:
        result = pipeline.result("light_clip", small.settings(**own))
        assert (result.path / "open_clip_model.safetensors").is_file()
        assert not [name for name in result.metrics if name.startswith("test/")]
