from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pytest
from PIL import Image

from mmphi.config import DataSettings, SourceSettings
from mmphi.data import hf_datasets
from mmphi.data.dataset_builder import read_examples
from mmphi.data.hf_datasets import read_dataset
from mmphi.data.images import ImageFolder
from mmphi.data.schema import Example, ReadReport
from mmphi.errors import DataError, ImageError


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def photos(folder: Path, count: int = 12) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


def image_folder(folder: Path, names: list[str]) -> Path:
    lines = [json.dumps({"file_name": name, "caption": f"number {name}"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def read(name: Path | str, split: str = "train", **columns: str) -> tuple[list[Example], ReadReport]:
    report = ReadReport()
    return list(read_dataset(str(name), split, "mine", report, **columns)), report


def stored(rows: dict) -> datasets.Dataset:
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_a_folder_of_images_is_read_where_it_lies(tmp_path):
    folder = image_folder(photos(tmp_path / "photos"), [f"{i}.png" for i in range(12)])
    source = SourceSettings(kind="datasets", path=str(folder), name="mine")
    examples, _ = read_examples(DataSettings(sources=[source], validation_images=0, test_images=4), None)
    assert Counter(e.split for e in examples) == {"train": 8, "test": 4}
    assert {e.image.path for e in examples} == set(folder.glob("*.png"))
    assert {e.image.id for e in examples} == {f"mine/{i}.png" for i in range(12)}
    assert not (tmp_path / "cache" / "mmphi" / "images").exists()


def test_an_image_in_many_rows_is_one_image(tmp_path):
    """One caption a row, the image repeated: by row it would stand on both sides of the split."""
    folder = photos(tmp_path / "photos", 6)
    images = [{"bytes": (folder / f"{i % 6}.png").read_bytes(), "path": None} for i in range(18)]
    stored({"image": images, "caption": [f"caption {i}" for i in range(18)]}).save_to_disk(tmp_path / "stored")
    source = SourceSettings(kind="datasets", path=str(tmp_path / "stored"))
    examples, _ = read_examples(DataSettings(sources=[source], validation_images=1, test_images=2), None)
    splits: dict[str, set] = {}
    for example in examples:
        splits.setdefault(example.image.id, set()).add(example.split)
    assert Counter(s for (s,) in map(tuple, splits.values())) == {"train": 3, "validation": 1, "test": 2}
    written = list((tmp_path / "cache" / "mmphi" / "images").iterdir())
    assert len(written) == 6
    assert Image.open(examples[3].image.path).getpixel((0, 0)) == (3, 0, 0)


def test_bytes_are_read_and_written_once(tmp_path, monkeypatch):
    folder = photos(tmp_path / "photos", 6)
    images = [{"bytes": (folder / f"{i % 6}.png").read_bytes(), "path": None} for i in range(12)]
    stored({"image": [*images, None], "caption": ["a thing"] * 13}).save_to_disk(tmp_path / "stored")
    first, report = read(tmp_path / "stored")
    assert len(first) == 12
    write = hf_datasets.DatasetImages._written
    monkeypatch.setattr(hf_datasets.DatasetImages, "_written", lambda *_: pytest.fail("bytes are read again"))
    again, same = read(tmp_path / "stored")
    assert again == first
    assert [each.reason for each in same.dropped] == [each.reason for each in report.dropped] == ["missing image"]
    monkeypatch.setattr(hf_datasets.DatasetImages, "_written", write)
    first[3].images[0].path.unlink()
    assert read(tmp_path / "stored")[0] == first
    assert first[3].images[0].path.is_file()
    changed = stored({"image": images[:11], "caption": ["a thing"] * 11})
    changed.save_to_disk(tmp_path / "other")
    assert len(read(tmp_path / "other")[0]) == 11


def test_a_dataset_that_a_function_makes_again_is_another(tmp_path):
    """Its fingerprint is that of the function, whatever the function yields."""
    folder = photos(tmp_path / "photos", 3)

    def rows():
        for i in range(3):
            yield {"image": {"bytes": (folder / f"{i}.png").read_bytes(), "path": None}, "caption": "a thing"}

    def saved() -> list[bytes]:
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        made = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(tmp_path / "made"))
        made.save_to_disk(str(tmp_path / "set"))
        return [example.images[0].path.read_bytes() for example in read(tmp_path / "set")[0]]

    first = saved()
    for i in range(3):
        Image.new("RGB", (8, 8), (0, 0, 200 + i)).save(folder / f"{i}.png")
    assert saved() == [(folder / f"{i}.png").read_bytes() for i in range(3)] != first


def test_columns_of_several_captions_and_rows_without(tmp_path):
    image = str(photos(tmp_path / "stored") / "0.png")
    rows = {"image": [image, image, None, image], "texts": [["a", " b "], [], ["c"], ["", "d"]]}
    stored(rows).save_to_disk(tmp_path / "stored")
    examples, report = read(tmp_path / "stored", text_column="texts", question="what?")
    assert [(e.id, e.turns[0].answer) for e in examples] == [("0.0", "a"), ("0.1", "b"), ("3.0", ""), ("3.1", "d")]
    assert {e.turns[0].question for e in examples} == {"what?"}
    assert [d.reason for d in report.dropped] == ["no caption", "missing image"]


def test_paths_as_words_stay_inside_the_folder(tmp_path):
    folder = photos(tmp_path / "photos")
    paths = ["0.png", "gone.png", "/etc/hostname", "../photos2/0.png"]
    photos(tmp_path / "photos2")
    lines = [json.dumps({"image": path, "caption": "a"}) for path in paths]
    (folder / "train.jsonl").write_text("\n".join(lines))
    report = ReadReport()
    rows = datasets.load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    rows.save_to_disk(folder / "stored")
    for path in folder.glob("*.png"):
        path.rename(folder / "stored" / path.name)
    examples = list(read_dataset(str(folder / "stored"), "train", "mine", report))
    assert [e.image.id for e in examples] == ["mine/0.png"]
    assert Counter(d.reason for d in report.dropped) == {"missing image": 1, "path leaves the image folder": 2}


def test_a_row_names_no_file_outside_the_dataset(tmp_path, monkeypatch):
    """It could be any file of this machine that a picture can be made of."""
    secret = photos(tmp_path / "private") / "3.png"
    own = photos(tmp_path / "stored") / "1.png"
    rows = [{"image": {"bytes": None, "path": str(path)}, "caption": path.stem} for path in (secret, own)]
    monkeypatch.setattr(hf_datasets, "load_rows", lambda *_: None)
    monkeypatch.setattr(hf_datasets, "_with_files", lambda *_: rows)
    examples, report = read(tmp_path / "stored")
    assert [e.turns[0].answer for e in examples] == ["1"]
    assert [d.reason for d in report.dropped] == ["path leaves the dataset's folder"]
    hub_folder = tmp_path / "hub" / "datasets--owner--name"
    fetched = hf_datasets.DatasetImages(ImageFolder(Path("owner/name"), "mine"), tmp_path / "cache", [hub_folder])
    (hub_folder / "snapshots").mkdir(parents=True)
    inside = shutil.copy(own, hub_folder / "snapshots")
    assert fetched.find({"bytes": None, "path": str(inside)}).path == Path(inside)
    with pytest.raises(ImageError, match="no file of the dataset"):
        fetched.find({"bytes": None, "path": str(secret)})


def test_what_is_wrong_is_said(tmp_path):
    folder = image_folder(photos(tmp_path / "photos"), ["0.png"])
    with pytest.raises(DataError, match="has no column 'text'; it has image, caption"):
        read(folder, text_column="text")
    datasets.Dataset.from_dict({"image": [1], "caption": ["a"]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(DataError, match="not images"):
        read(tmp_path / "numbers")
    datasets.DatasetDict({"test": stored({"image": [str(folder / "0.png")], "caption": ["a"]})}).save_to_disk(
        tmp_path / "splits"
    )
    with pytest.raises(DataError, match="splits test"):
        read(tmp_path / "splits")
    with pytest.raises(DataError, match="cannot be loaded"):
        read(folder, split="nosuch")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "caption"')
    with pytest.raises(DataError, match="fix the folder"):
        read(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        read(tmp_path / "empty")


def test_a_name_nobody_can_reach_names_the_local_way(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="'nobody/nothing', split 'train', cannot be loaded") as caught:
        read("nobody/nothing")
    assert "give a local folder" in caught.value.hint


def test_a_name_may_say_its_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or 1 / 0)
    for name in ("owner/name:small", "owner/name"):
        with pytest.raises(DataError, match="division"):
            hf_datasets.load_rows(name, "test", "abc")
    options = {"split": "test", "revision": "abc"}
    assert asked == [(("owner/name", "small"), options), (("owner/name", None), options)]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    image = {"bytes": (photos(tmp_path / "photos") / "0.png").read_bytes(), "path": None}
    stored({"image": [image], "caption": ["a"]}).save_to_disk(tmp_path / "stored")

    def full(self: Path, _: bytes) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match="No space left on device"):
        read(tmp_path / "stored")
    assert not list((tmp_path / "cache" / "mmphi" / "images").iterdir())
