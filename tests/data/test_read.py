from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import Recorder
from PIL import Image

from mmphi.data.read import log_report, mixture, read_examples
from mmphi.data.records import Turn
from mmphi.errors import DataError, SettingsError
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
        llava_row(9, conversations=[{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]),
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
        "no answered question": 2,
        "malformed row": 3,
        "malformed turn": 1,
        "turns out of order": 2,
        "empty answer": 1,
        "answer over 2000 words": 1,
        "text is not Unicode": 1,
    }
    assert report.bad_share == 13 / 14
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


def test_nothing_to_read_is_said(folder, recorder):
    chosen = settings(folder, write(folder, []))
    _, report = read_examples(chosen, None)
    with pytest.raises(DataError, match="the data has no rows"):
        log_report(report, recorder, chosen)


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


def test_more_images_move_few_over_the_border(folder):
    def test_images(count: int) -> set[str]:
        source = captions(folder, [(f"{i}.png", "a") for i in range(count)])
        examples, _ = read_examples(settings(folder, source, test_images=6), None)
        return {e.image.id for e in examples if e.split == "test"}

    assert len(test_images(19) - test_images(20)) <= 1
    assert len(test_images(15) - test_images(20)) <= 5
    assert test_images(20) != {f"captions/{i}.png" for i in range(6)}


def test_another_seed_splits_otherwise(folder):
    source = captions(folder, [(f"{i}.png", "a") for i in range(20)])
    splits = [read_examples(settings(folder, source, test_images=6, split_seed=s), None)[0] for s in (0, 1)]
    assert splits[0] != splits[1]


def test_sources_of_the_same_files_agree_on_the_split(folder):
    """One source tests on a photo; the other must not train on it."""
    first = captions(folder, [(f"{i}.png", "a") for i in range(20)], "first.csv")
    images = [{"filename": f"{i}.png", "split": "test", "sentences": [{"raw": "b"}]} for i in range(4)]
    (folder / "k.json").write_text(json.dumps({"images": images}))
    second = {"kind": "karpathy", "path": str(folder / "k.json")}
    examples, _ = read_examples(settings(folder, first, second, test_images=2), None)
    splits: dict[Path, set] = {}
    for example in examples:
        splits.setdefault(example.image.path, set()).add(example.split)
    assert all(len(s) == 1 for s in splits.values())
    assert {p.stem for p, s in splits.items() if s == {"test"}} >= {"0", "1", "2", "3"}


def test_sources_need_names_of_their_own_and_paths(folder):
    source = captions(folder, [("0.png", "a")])
    with pytest.raises(ValueError, match="two sources are called 'captions'"):
        settings(folder, source, source)
    with pytest.raises(SettingsError, match="has no path"):
        read_examples(settings(folder, {"kind": "llava"}), None)
    with pytest.raises(SettingsError, match="has no images"):
        read_examples(settings(folder, {**source, "images": ""}), None)


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


def test_most_images_of_each_split_that_a_source_brings(folder):
    splits = ["train"] * 10 + ["val"] * 5 + ["test"] * 5
    images = [{"filename": f"{i}.png", "split": s, "sentences": [{"raw": "a"}]} for i, s in enumerate(splits)]
    (folder / "k.json").write_text(json.dumps({"images": images}))
    chosen = settings(folder, {"kind": "karpathy", "path": str(folder / "k.json")}, max_images=3)
    examples, _ = read_examples(chosen, None)
    assert Counter(e.split for e in examples) == {"train": 3, "validation": 3, "test": 3}


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
