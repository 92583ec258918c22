from __future__ import annotations

import json

import pytest

from mmphi.stages import load_settings
from mmphi.stages.advice import advice

PHOTOS = {"data.sources": json.dumps([{"kind": "captions", "path": "captions.csv", "images": "."}])}
TEXTS = {"corpus.sources": json.dumps([{"path": "texts.txt"}])}
COLUMN = {"data.sources": json.dumps([{"kind": "llava", "path": "rows.json", "images": ".", "text_column": "text"}])}
BOTH = {"data.sources": json.dumps([{"kind": "scenes"}, {"kind": "captions", "path": "captions.csv", "images": "."}])}


@pytest.mark.parametrize("stage", ["projector", "qlora"])
def test_own_photographs_with_a_language_model_of_drawn_scenes(stage: str) -> None:
    (line,) = advice(stage, load_settings("tiny", PHOTOS, stage, expand=False))
    assert "captions of drawn scenes" in line
    assert "language.model" in line


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("projector", {}),
        ("projector", BOTH),
        ("projector", PHOTOS | TEXTS),
        ("projector", PHOTOS | {"language.model": "owner/name"}),
        ("pretrain", PHOTOS),
        ("light_clip", PHOTOS),
    ],
)
def test_nothing_to_say_where_the_words_fit_the_data(stage: str, changes: dict[str, str]) -> None:
    assert advice(stage, load_settings("tiny", changes, stage, expand=False)) == []


@pytest.mark.parametrize("stage", ["projector", "qlora", "export"])
def test_a_setting_of_another_projector_kind_is_reported(stage: str) -> None:
    (line,) = advice(stage, load_settings("tiny", {"projector.queries": "8"}, stage, expand=False))
    assert line.startswith("note: projector.queries = 8 has no effect: a projector of kind mlp does not use")
    assert line.endswith("the kinds that do: resampler")
    changes = {"projector.kind": "resampler", "projector.queries": "8", "projector.merge": "4"}
    (line,) = advice(stage, load_settings("tiny", changes, stage, expand=False))
    assert "projector.merge = 4" in line
    assert line.endswith("the kinds that do: pixel_shuffle, ldp_v2")


def test_a_setting_of_another_kind_of_source_is_reported() -> None:
    (line,) = advice("light_clip", load_settings("tiny", COLUMN, "light_clip", expand=False))
    assert line.startswith("note: data.sources.0.text_column has no effect: the reader of kind llava does not use it")
    assert line.endswith("the kinds that do: captions, datasets")


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("projector", {"projector.kind": "resampler", "projector.queries": "8"}),
        ("projector", {"projector.kind": "ldp_v2", "projector.merge": "4"}),
        ("projector", {"projector.queries": "16"}),
        ("pretrain", {"projector.queries": "8"}),
        ("pretrain", COLUMN),
        ("scenes", {"projector.queries": "8"} | COLUMN),
    ],
)
def test_nothing_to_say_of_settings_that_are_used_or_concern_another_stage(stage: str, changes: dict[str, str]) -> None:
    assert advice(stage, load_settings("tiny", changes, stage, expand=False)) == []
