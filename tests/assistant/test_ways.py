"""One question by every way there is: the same answer."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from answerers import all_ways, picture, recording

from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.stage import Result

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from small import built, settings


@pytest.fixture(scope="module")
def projector(tmp_path_factory: pytest.TempPathFactory, _database: Path) -> Iterator[Result]:
    with built("projector", _database, tmp_path_factory.mktemp("ways")) as pipeline:
        yield Pipeline(pipeline.stages).build("projector", settings())


def test_photo_speech_and_text_get_the_same_answer_by_every_way(
    projector: Result,
    tmp_path: Path,
    tiny_whisper: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "photo.png").write_bytes(picture())
    (tmp_path / "question.wav").write_bytes(recording())
    found = all_ways(
        projector.path,
        tmp_path / "photo.png",
        tmp_path / "question.wav",
        "what is it?",
        str(tiny_whisper),
        capsys,
        monkeypatch,
    )
    assert found["python"]
    assert found.pop("page") == inspect.cleandoc(found["python"])
    assert set(found.values()) == {found["python"]}
