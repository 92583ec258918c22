from __future__ import annotations

import json

import pytest

from mmphi.stages import load_settings
from mmphi.stages.advice import advice

PHOTOS = {"data.sources": json.dumps([{"kind": "captions", "path": "captions.csv", "images": "."}])}
TEXTS = {"corpus.sources": json.dumps([{"path": "texts.txt"}])}
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
