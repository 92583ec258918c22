from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import mmphi
from mmphi.cli import main
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.stage import Result

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from small import built, settings


@pytest.fixture(scope="module")
def projector(tmp_path_factory: pytest.TempPathFactory, small_chain: Path) -> Iterator[Result]:
    with built("projector", small_chain, tmp_path_factory.mktemp("ask")) as pipeline:
        # The newest model of the store.
        yield Pipeline(pipeline.stages).build("projector", settings(projector__seed="11"), after=False)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (64, 64), "red").save(path)
    return path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["ask", *words]) == 0
    return capsys.readouterr().out


def test_the_answer_is_that_of_python(projector: Result, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = mmphi.load(projector.path).ask("what is it?", photo, max_new_tokens=6)
    words = "--image", str(photo), "--max-tokens", "6", "what is it?"
    assert said(capsys, "--model", str(projector.path), *words) == expected + "\n"
    assert said(capsys, "--model", projector.run_id, *words) == expected + "\n"
    assert said(capsys, "--run", projector.run_id, *words) == expected + "\n"
    assert said(capsys, *words) == expected + "\n"  # The newest of the store.
    found = json.loads(said(capsys, "--json", *words))
    assert found["answer"] == expected
    assert found["model"] == projector.run_id
    assert found["reason"] in ("stop", "length")
    assert 1 <= found["tokens"] <= 6
    assert found["prompt_tokens"] > 16
    assert found["heard"] == []


def test_a_question_is_read_from_standard_input(
    projector: Result, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    typed = said(capsys, "--model", str(projector.path), "--image", str(photo), "--max-tokens", "6", "what is it?")
    (tmp_path / "question.txt").write_text("what is it?\n")
    with (tmp_path / "question.txt").open() as question:
        monkeypatch.setattr(sys, "stdin", question)
        piped = said(capsys, "--model", str(projector.path), "--image", str(photo), "--max-tokens", "6", "-")
    assert piped == typed


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "the question is empty"),
        (["--temperature", "-1", "x"], "temperature"),
        (["--model", "nothing-of-that-name", "x"], "nothing-of-that-name"),
        (["--image", "nowhere.png", "x"], "nowhere.png"),
    ],
)
def test_what_is_wrong_is_said(
    projector: Result, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", *words]) == 2
    assert why in capsys.readouterr().err
    assert main(["ask", "--json", *words]) == 2
    assert why in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_store_without_models_says_what_to_do(empty_store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "x"]) == 2
    assert "mmphi projector" in capsys.readouterr().err


def test_a_missing_recording_is_named_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "--model", str(tmp_path), "--audio", "nope.mp3"]) == 2
    assert "there is no recording nope.mp3" in capsys.readouterr().err


def test_files_that_are_no_images_are_told(
    projector: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    whole = tmp_path / "whole.png"
    Image.new("RGB", (64, 64), "red").save(whole)
    shutil.copy(whole, broken)
    broken.write_bytes(whole.read_bytes()[:60])
    assert main(["ask", "--model", str(projector.path), "--image", str(broken), "x"]) == 2
    assert "broken.png" in capsys.readouterr().err
