from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import Recorder
from PIL import Image

from mmphi.data.read import log_report, mixture, read_examples
from mmphi.data.records import Turn
from mmphi.errors import DataError
from mmphi.settings import DataSettings, Settings, SourceSettings


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def settings(folder: Path, *sources: dict, **data) -> Settings:
    full = [SourceSettings(**{"images": str(folder / "images"), **s}) for s in sources]
    return Settings(data=DataSettings(sources=full, **{"validation_images": 0, "test_images": 0, **data}))


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


def test_llava_as_the_real_file_is(folder):
    four = [{"from": f, "value": v} for f, v in zip(["human", "gpt"] * 2, ["<image>\na?", "b", "c?", "d"], strict=True)]
    rows = [
        llava_row(33471),
        llava_row("000-1", value="what?\n<image>"),
        {"id": "text", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        llava_row(5, conversations=four),
    ]
    examples, report = read_examples(settings(folder, write(folder, rows)), None)
    assert [e.id for e in examples] == ["33471", "000-1", "text", "5"]
    assert [e.turns[0].question for e in examples] == ["what?", "what?", "hi", "a?"]
    assert examples[2].image is None
    assert examples[3].turns == (Turn("a?", "b"), Turn("c?", "d"))
    assert examples[0].image.id == "llava/0.png"
    assert not report.dropped


def test_bad_rows_are_counted_with_their_reason(folder):
    rows = [
        llava_row(0),
        llava_row(1, image="nowhere.png"),
        llava_row(2, image="../data.json"),
        llava_row(3, conversations=[]),
        llava_row(4, conversations="hello"),
        llava_row(5, conversations=[{"from": "human", "value": None}, {"from": "gpt", "value": "x"}]),
        llava_row(6, conversations=[{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]),
        "row",
        llava_row(8, conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "  "}]),
        llava_row(9, conversations=[{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]),
        llava_row(9, conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "word " * 10_000}]),
    ]
    examples, report = read_examples(settings(folder, write(folder, rows)), None)
    assert [e.id for e in examples] == ["0"]
    assert Counter(d.reason for d in report.dropped) == {
        "missing image": 1,
        "path leaves the image folder": 1,
        "no answered question": 2,
        "malformed row": 2,
        "malformed turn": 1,
        "turns out of order": 1,
        "empty answer": 1,
        "answer over 2000 words": 1,
    }
    assert report.bad_share == 10 / 11
    assert report.kept["llava"] == 1
    assert "row 1" in report.table()


def test_too_many_bad_rows_stop_the_run(folder, recorder):
    chosen = settings(folder, write(folder, [llava_row(0), llava_row(1, image="x.png")]), max_bad_share=0.4)
    _, report = read_examples(chosen, None)
    with pytest.raises(DataError, match=r"50\.0% of the rows"):
        log_report(report, recorder, chosen)
    assert recorder.tables["data_read"][1]["outcome"] == "dropped: missing image"
    log_report(report, Recorder(), settings(folder, max_bad_share=0.5))


def test_malformed_json_names_the_line(folder):
    with pytest.raises(DataError, match=r"data\.json, line 3, column \d+"):
        read_examples(settings(folder, write(folder, '[\n{"id": 1},\n{"id": }\n]')), None)
    with pytest.raises(DataError, match="not a list"):
        read_examples(settings(folder, write(folder, {"a": 1})), None)
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(settings(folder, {"kind": "llava", "path": str(folder / "none.json")}), None)


def test_captions_empty_spaces_and_endless(folder):
    rows = [("0.png", "a dog"), ("0.png", ""), ("1.png", "   "), ("2.png", "w " * 10_000), ("x.png", "a cat")]
    examples, report = read_examples(settings(folder, captions(folder, rows)), None)
    assert [e.turns for e in examples] == [(Turn("", "a dog"),)]
    assert Counter(d.reason for d in report.dropped)["empty answer"] == 2
    with pytest.raises(DataError, match=r"has no column 'caption'; it has image, text"):
        read_examples(settings(folder, captions(folder, [], header="image,text")), None)


def test_split_is_by_image_never_by_caption(folder):
    rows = [(f"{i}.png", f"caption {k} of {i}") for k in range(5) for i in range(20)]
    chosen = settings(folder, captions(folder, rows), validation_images=3, test_images=5)
    examples, _ = read_examples(chosen, None)
    splits: dict[str, set] = {}
    for example in examples:
        splits.setdefault(example.image.id, set()).add(example.split)
    assert all(len(s) == 1 for s in splits.values())
    assert Counter(s for (s,) in map(tuple, splits.values())) == {"train": 12, "validation": 3, "test": 5}
    again, _ = read_examples(chosen, None)
    assert again == examples
    with pytest.raises(DataError, match="20 images of 'captions' are to be kept apart"):
        read_examples(settings(folder, captions(folder, rows), validation_images=10, test_images=10), None)


def test_karpathy_brings_its_splits(folder):
    images = [
        {"filename": f"{i}.png", "split": split, "sentences": [{"raw": "one"}, {"raw": "two"}]}
        for i, split in enumerate(["train", "restval", "val", "test"])
    ]
    path = folder / "dataset.json"
    path.write_text(json.dumps({"images": [*images, {"filename": "9.png", "split": "?"}]}))
    examples, report = read_examples(settings(folder, {"kind": "karpathy", "path": str(path)}), None)
    assert [e.split for e in examples[::2]] == ["train", "train", "validation", "test"]
    assert len(examples) == 8
    assert [d.reason for d in report.dropped] == ["malformed row"]


def test_any_dataset_with_an_image_and_a_text_column(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = [json.dumps({"file_name": f"{i}.png", "caption": f"number {i}"}) for i in range(20)]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
    chosen = settings(folder, {"kind": "datasets", "path": str(folder / "images"), "name": "mine"}, test_images=4)
    examples, _ = read_examples(chosen, None)
    assert sorted(e.turns[0].answer for e in examples)[:2] == ["number 0", "number 1"]
    assert Counter(e.split for e in examples) == {"train": 16, "test": 4}
    assert all(e.image.path.is_file() for e in examples)
    with pytest.raises(DataError, match="give a local folder"):
        read_examples(settings(folder, {"kind": "datasets", "path": "nobody/nothing"}), None)


def test_mixture_follows_the_weights(folder):
    first = captions(folder, [(f"{i}.png", f"a {i}") for i in range(10)], "first.csv")
    second = captions(folder, [(f"{i}.png", f"b {i}") for i in range(10, 20)], "second.csv")
    chosen = settings(folder, {**first, "weight": 3}, {**second, "weight": 1})
    examples, _ = read_examples(chosen, None)
    mixed = mixture(examples, chosen)
    assert Counter(e.source for e in mixed) == {"first": 15, "second": 5}
    assert {e.turns[0].answer for e in mixed if e.source == "first"} == {f"a {i}" for i in range(10)}
    assert mixture(examples, chosen) == mixed
    chosen.data.split_seed = 1
    assert mixture(examples, chosen) != mixed


def test_most_images_of_a_source(folder):
    rows = [(f"{i}.png", f"caption {k}") for i in range(20) for k in range(2)]
    examples, report = read_examples(settings(folder, captions(folder, rows), max_images=7), None)
    assert len({e.image.id for e in examples}) == 7
    assert report.kept["captions"] == 14
    assert not report.dropped


@pytest.mark.real
def test_real_captions(real_photos):
    source = {"kind": "captions", "path": str(real_photos / "captions.csv"), "images": str(real_photos / "images")}
    examples, report = read_examples(settings(real_photos, source, test_images=100), None)
    assert len(examples) == 4000
    assert not report.dropped
    assert len({e.image.id for e in examples if e.split == "test"}) == 100
