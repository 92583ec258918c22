from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from sources import captions, llava_row, photo_folder, settings, write

from mmphi.data.dataset_builder import read_examples
from mmphi.data.schema import Turn
from mmphi.errors import DataError


@pytest.fixture
def folder(tmp_path) -> Path:
    return photo_folder(tmp_path)


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


def test_llava_ids_repeat_and_an_answer_may_come_first(folder):
    first = {"from": "gpt", "value": "welcome"}
    row = llava_row("7")
    rows = [row, row, llava_row(7, conversations=[first, *row["conversations"]]), llava_row(None)]
    examples, report = read_examples(settings(folder, write(folder, rows)), None)
    assert [e.id for e in examples] == ["7", "7#2", "7#3", "3"]
    assert {e.turns for e in examples} == {(Turn("what?", "a thing"),)}
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
        llava_row(9, conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "word " * 10_000}]),
        llava_row(10, conversations=[{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]),
        llava_row(11, value="half a pair: \ud800"),
        llava_row(12, image=7),
    ]
    examples, report = read_examples(settings(folder, write(folder, rows)), None)
    assert [e.id for e in examples] == ["0"]
    assert Counter(d.reason for d in report.dropped) == {
        "missing image": 1,
        "path leaves the image folder": 1,
        "no answered question": 3,
        "no list called conversations or messages (it has id, image, conversations)": 1,
        "a row is a str, not an object": 1,
        "malformed image": 1,
        "malformed turn": 1,
        "empty answer": 1,
        "answer over 2000 words": 1,
        "text is not Unicode": 1,
    }
    assert report.bad_share == 12 / 13
    assert report.kept["llava"] == 1
    assert "row 2" in report.table()  # Rows are counted from 1.
    assert "row 0" not in report.table()


def test_malformed_json_names_the_line(folder):
    with pytest.raises(DataError, match=r"data\.json, line 3, column \d+"):
        read_examples(settings(folder, write(folder, '[\n{"id": 1},\n{"id": }\n]')), None)
    with pytest.raises(DataError, match="not a list"):
        read_examples(settings(folder, write(folder, {"a": 1})), None)
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(settings(folder, {"kind": "llava", "path": str(folder / "none.json")}), None)


def test_json_of_any_other_fault(folder):
    path = folder / "data.json"
    source = {"kind": "llava", "path": str(path)}
    for content, said in {
        b'[\n"\xff"]': "line 2: not UTF-8",
        b"[" * 100_000: "cannot be read",
        b"[" + b"9" * 5000 + b"]": "cannot be read",
        b"": "line 1, column 1",
    }.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            read_examples(settings(folder, source), None)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([llava_row(1)]).encode())
    assert len(read_examples(settings(folder, source), None)[0]) == 1


def test_captions_with_commas_and_quotes(folder):
    rows = 'image,caption\n0.png,a dog, running\n1.png,"a dog, ""running"""\n2.png\n"3.png","two\nlines"\n'
    (folder / "c.csv").write_text(rows)
    examples, report = read_examples(settings(folder, {"kind": "captions", "path": str(folder / "c.csv")}), None)
    assert [e.turns[0].answer for e in examples] == ['a dog, "running"', "two\nlines"]
    assert [(d.where, d.reason.split(" (")[0]) for d in report.dropped] == [
        ("c.csv, line 2", "more values than columns"),
        ("c.csv, line 4", "malformed row"),
    ]
    (folder / "c.csv").write_text('image,caption\n0.png,a\n1.png,"never closed\n' + "2.png,b\n" * 9)
    with pytest.raises(DataError, match="line 3 and after"):
        read_examples(settings(folder, {"kind": "captions", "path": str(folder / "c.csv")}), None)
    (folder / "c.csv").write_bytes(b"image,caption\n0.png,caf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_examples(settings(folder, {"kind": "captions", "path": str(folder / "c.csv")}), None)


def test_captions_empty_spaces_and_endless(folder):
    rows = [("0.png", "a dog"), ("0.png", ""), ("1.png", "   "), ("2.png", "w " * 10_000), ("x.png", "a cat")]
    examples, report = read_examples(settings(folder, captions(folder, rows)), None)
    assert [e.turns for e in examples] == [(Turn("", "a dog"),)]
    assert Counter(d.reason for d in report.dropped)["empty caption"] == 2
    assert next(d.where for d in report.dropped if d.reason == "empty caption").endswith(", line 3")
    with pytest.raises(DataError, match=r"has no column 'caption'; it has image, text"):
        read_examples(settings(folder, captions(folder, [], header="image,text")), None)


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


@pytest.mark.real
def test_real_captions(real_photos):
    source = {"kind": "captions", "path": str(real_photos / "captions.csv"), "images": str(real_photos / "images")}
    examples, report = read_examples(settings(real_photos, source, test_images=100), None)
    assert len(examples) == 4000
    assert not report.dropped
    assert len({e.image.id for e in examples if e.split == "test"}) == 100


@pytest.mark.parametrize(
    ("said", "layout"),
    [
        ("000000033471.jpg", "COCO_train2014_000000033471.jpg"),
        ("coco/train2017/000000033471.jpg", "000000033471.jpg"),
        ("COCO_train2014_000000033471.jpg", "train2017/000000033471.jpg"),
        ("000000033471.jpg", "coco/train2017/000000033471.jpg"),
        ("train2014/COCO_train2014_000000033471.jpg", "val2014/COCO_val2014_000000033471.jpg"),
    ],
)
def test_coco_images_are_found_in_any_layout(folder, said, layout):
    path = folder / "images" / layout
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / "images" / "0.png").rename(path)
    examples, report = read_examples(settings(folder, write(folder, [llava_row(1, image=said)])), None)
    assert examples[0].image.path == path
    assert examples[0].image.id == f"llava/{layout}"
    (note,) = [row for row in report.rows() if "found as" in row["outcome"]]
    assert note["outcome"] == f"kept: images found as {layout.replace('000000033471', 'NUMBER')}"


def test_other_names_are_not_guessed_at(folder):
    examples, report = read_examples(settings(folder, write(folder, [llava_row(1, image="sub/0.png")])), None)
    assert examples == []
    assert report.dropped[0].reason == "missing image"
