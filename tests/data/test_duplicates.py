"""The same picture under two names is on one side of every split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from sources import captions, settings

from mmphi.data.dataset_builder import read_examples
from mmphi.data.duplicates import (
    ImageFingerprint,
    difference_hash,
    fingerprint_of,
    merge_near_duplicates,
    picture_names,
)

COUNT = 30


def photo(seed: int) -> Image.Image:
    """Soft random colours, as photographs have them."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((64, 48), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for i in range(COUNT):
        photo(i).save(tmp_path / "images" / f"{i}.png")
        shutil.copy(tmp_path / "images" / f"{i}.png", tmp_path / "images" / f"copy-{i}.png")
        photo(i).resize((40, 30)).save(tmp_path / "images" / f"near-{i}.jpg", quality=60)
    return tmp_path


def split_of(folder: Path, names: list[str], **data: object) -> tuple[dict[str, str], dict[str, int]]:
    source = captions(folder, [(name, "a thing") for name in names])
    examples, report = read_examples(settings(folder, source, validation_images=6, test_images=6, **data), None)
    notes = {text: count for (_, text), count in report.notes.items()}
    return {example.images[0].path.name: example.split for example in examples}, notes


def test_copies_share_a_split_and_are_counted(folder: Path) -> None:
    names = [f"{i}.png" for i in range(COUNT)]
    split, notes = split_of(folder, [*names, *(f"copy-{name}" for name in names)])
    assert all(split[name] == split[f"copy-{name}"] for name in names)
    assert set(split.values()) == {"train", "validation", "test"}
    assert notes["files with a duplicate picture"] == COUNT
    assert sum(count for text, count in notes.items() if text.startswith("moved to")) > 0


def test_without_copies_nothing_changes(folder: Path) -> None:
    """The split of earlier versions, which went by names alone."""
    split, notes = split_of(folder, [f"{i}.png" for i in range(COUNT)])
    assert notes == {}
    assert sum(each == "test" for each in split.values()) == 6
    assert sum(each == "validation" for each in split.values()) == 6


def test_near_duplicates_share_a_split_where_that_is_asked_for(folder: Path) -> None:
    names = [*(f"{i}.png" for i in range(COUNT)), *(f"near-{i}.jpg" for i in range(COUNT))]
    kept, _ = split_of(folder, names)
    assert any(kept[f"{i}.png"] != kept[f"near-{i}.jpg"] for i in range(COUNT))
    grouped, notes = split_of(folder, names, near_duplicates="group")
    assert all(grouped[f"{i}.png"] == grouped[f"near-{i}.jpg"] for i in range(COUNT))
    assert notes["files with a duplicate picture or a near duplicate"] == COUNT
    assert len(set(grouped.values())) == 3


def test_an_unreadable_file_is_a_picture_of_its_own(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    paths = [
        folder / "broken.png",
        folder / "missing.png",
        folder / "images" / "0.png",
        folder / "images" / "copy-0.png",
    ]
    found = picture_names(paths, near=True)
    assert len(set(found.values())) == 3
    assert found[paths[2]] == found[paths[3]]


def test_every_near_duplicate_is_found_and_groups_are_not_chained() -> None:
    """Against all pairs, of hashes in clusters of a few changed bits."""
    rng = np.random.default_rng(0)
    looks: dict[str, ImageFingerprint] = {}
    for cluster in range(40):
        middle = int(rng.integers(0, 2**63))
        for member in range(6):
            bits = middle
            for place in rng.choice(64, rng.integers(0, 5), replace=False):
                bits ^= 1 << int(place)
            looks[f"{cluster}/{member}"] = ImageFingerprint(bits, bytes(48))
    found, firsts = merge_near_duplicates(looks), list[str]()
    for name, look in looks.items():
        near = [other for other in firsts if look.near(looks[other])]
        assert (found[name] in near) if near else (found[name] == name)
        firsts += [] if near else [name]
    assert len(firsts) < len(looks) / 2


def test_pictures_of_little_are_told_apart() -> None:
    """Drawings on a white ground have hardly a bit in their hash, and those that have differ in colour."""
    drawn = {}
    for number in range(30):
        image = Image.new("RGB", (112, 112), "white")
        left, top = (int(n) for n in np.random.default_rng(number).integers(0, 80, 2))
        ImageDraw.Draw(image).ellipse((left, top, left + 25, top + 25), fill="red")
        drawn[str(number)] = fingerprint_of(image)
    assert merge_near_duplicates(drawn) == {name: name for name in drawn}
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (32, 16)))
    black = Image.new("L", stripes.size)
    looks = {
        "red": fingerprint_of(Image.merge("RGB", (stripes, black, black))),
        "red again": fingerprint_of(Image.merge("RGB", (stripes, black, black))),
        "blue": fingerprint_of(Image.merge("RGB", (black, black, stripes))),
    }
    assert looks["red"].bits == looks["red again"].bits
    assert merge_near_duplicates(looks)["blue"] == "blue"


def test_pictures_that_share_an_example_leak_nowhere(folder: Path) -> None:
    """Rows of two images that overlap: a picture that is held out is in no training row."""
    rows = [
        {
            "image": [f"{i}.png", f"{i + 1}.png"],
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}],
        }
        for i in range(COUNT - 1)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    source = {"kind": "llava", "path": str(folder / "rows.json")}
    examples, report = read_examples(settings(folder, source, validation_images=2, test_images=4), None)
    of = {
        split: {i.path.name for e in examples if e.split == split for i in e.images}
        for split in ("train", "validation", "test")
    }
    assert not of["train"] & of["test"]
    assert not of["train"] & of["validation"]
    assert not of["validation"] & of["test"]
    assert all(of.values())
    left_out = sum(count for (_, text), count in report.notes.items() if "left out" in text)
    assert len(examples) + left_out == len(rows)
    assert report.kept.total() == len(examples)


def test_the_hash_follows_brightness_from_left_to_right() -> None:
    ramp = np.tile(np.arange(255, 75, -20, dtype=np.uint8), (8, 1))
    assert difference_hash(Image.fromarray(ramp).convert("RGB")) == 2**64 - 1
    assert difference_hash(Image.fromarray(ramp[:, ::-1].copy()).convert("RGB")) == 0
