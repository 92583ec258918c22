from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from builders import Recorder, byte_tokenizer, of_length
from sources import captions, llava_row, photo_folder, settings, write

from mmphi.data.dataset_builder import read_examples, stratified
from mmphi.data.mixture import mixture_indices
from mmphi.data.schema import Example, Turn
from mmphi.data.tokenized_dataset import count_left_out, tokenized_examples
from mmphi.errors import DataError, SettingsError
from mmphi.stages.shared_models import log_report
from mmphi.text.prompt import Prompt


@pytest.fixture
def folder(tmp_path) -> Path:
    return photo_folder(tmp_path)


def test_too_many_bad_rows_stop_the_run(folder, recorder):
    chosen = settings(folder, write(folder, [llava_row(0), llava_row(1, image="x.png")]), max_bad_share=0.4)
    _, report = read_examples(chosen, None)
    with pytest.raises(DataError, match=r"50\.0% of the rows"):
        log_report(report, recorder, chosen)
    assert recorder.tables["data_read"][1]["outcome"] == "dropped: missing image"
    log_report(report, Recorder(), settings(folder, max_bad_share=0.5))


def test_nothing_to_read_is_said(folder, recorder):
    chosen = settings(folder, write(folder, []))
    _, report = read_examples(chosen, None)
    with pytest.raises(DataError, match="the data has no rows"):
        log_report(report, recorder, chosen)


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
    with pytest.raises(DataError, match=r"10 \+ 10 images of 'captions', but it has"):
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


def test_mixture_follows_the_weights(folder):
    first = captions(folder, [(f"{i}.png", f"a {i}") for i in range(10)], "first.csv")
    second = captions(folder, [(f"{i}.png", f"b {i}") for i in range(10, 20)], "second.csv")
    chosen = settings(folder, {**first, "weight": 3}, {**second, "weight": 1})
    examples, _ = read_examples(chosen, None)
    sources = [e.source for e in examples]

    def mix() -> list:
        return [examples[i] for i in mixture_indices(sources, chosen)]

    mixed = mix()
    assert Counter(e.source for e in mixed) == {"first": 15, "second": 5}
    assert {e.turns[0].answer for e in mixed if e.source == "first"} == {f"a {i}" for i in range(10)}
    assert mix() == mixed
    chosen.split_seed = 1
    assert mix() != mixed


def test_validation_is_a_seeded_sample_of_every_source_and_kind():
    """Not the first in the order of files: with several sources, that would be the first source alone."""
    kinds = [("a", "caption")] * 300 + [("a", "questions")] * 20 + [("b", "caption")] * 40
    examples = [Example(str(i), (), (Turn("", "x"),), s, attributes={"kind": k}) for i, (s, k) in enumerate(kinds)]
    chosen = stratified(examples, 90, seed=0)
    assert Counter((e.source, e.attributes["kind"]) for e in chosen) == {
        ("a", "caption"): 35,
        ("a", "questions"): 20,
        ("b", "caption"): 35,
    }
    assert [e.id for e in chosen] == [e.id for e in stratified(examples, 90, seed=0)]
    assert [e.id for e in chosen] != [e.id for e in stratified(examples, 90, seed=1)]
    assert max(int(e.id) for e in chosen if e.source == "a" and e.attributes["kind"] == "caption") > 200
    assert len(stratified(examples, 1000, seed=0)) == len(examples)


def test_rows_that_do_not_fit_are_counted_once_however_often_the_mixture_repeats_them(folder, tmp_path):
    """They were counted each time that the mixture took them: kept = -124."""
    first = captions(folder, [(f"{i}.png", "far too long " * 50) for i in range(4)], "first.csv")
    second = captions(folder, [(f"{i}.png", f"b {i}") for i in range(4, 20)], "second.csv")
    chosen = settings(folder, {**first, "weight": 9}, {**second, "weight": 1})
    examples, report = read_examples(chosen, None)
    sequences = tokenized_examples(examples, Prompt(byte_tokenizer(), "plain"), of_length(4), 40, tmp_path / "cache")
    count_left_out(sequences, examples, 40, report)
    assert report.kept == {"first": 0, "second": 16}
    assert len(report.dropped) == 4
    assert {sequences.sources[i] for i in mixture_indices(sequences.sources, chosen)} == {"second"}


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
