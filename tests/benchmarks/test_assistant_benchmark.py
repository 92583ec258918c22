from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mmphi
from mmphi.benchmarks import assistant
from mmphi.benchmarks._assistant_sides import LENGTHS, QUESTIONS, bodies, generate
from mmphi.benchmarks._load import Seen, ask, load, summary
from mmphi.cli import main
from mmphi.models.multimodal import Multimodal

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
from answerers import answerer, picture, served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assistant")
    assistant._random(folder, "tiny")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for colour in ("red", "blue", "green"):
        (folder / f"{colour}.png").write_bytes(picture(colour))
    return assistant.pictures(folder)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mmphi serve` in this process: that its own starts and answers is a test of tests/serving."""

    @contextmanager
    def serving(command: tuple[str, int]) -> Iterator[tuple[str, int]]:
        model, slots = command
        with served(mmphi.load(model), slots=slots) as address:
            yield address, os.getpid()

    monkeypatch.setattr(assistant, "mmphi_server", lambda model, slots: (model, slots))
    monkeypatch.setattr(assistant, "serving", lambda of: (serving if isinstance(of, tuple) else alone)(of))


alone = assistant.serving


@pytest.mark.usefixtures("here")
def test_all_sides_say_the_same(exported: Path) -> None:
    """transformers' server in a process of its own, ours, and LLaVA's loop, on the same weights."""
    found = {
        side: assistant.run_side(side, str(exported / "mmphi"), exported / "llava", exported / "images", 4, 2)
        for side in ("transformers", "mmphi")
    }
    rounds = assistant.rounds_of(assistant.pictures(exported / "images"), 4, 2, "")
    for users, asked in rounds.items():
        looped, _ = generate(exported / "llava", asked, users)
        said = [each.text for each in looped]
        assert found["mmphi"][str(users)]["texts"] == said
        assert found["transformers"][str(users)]["texts"] == said
        assert [each.tokens for each in looped] == [body["max_tokens"] for body in asked]
    assert len(set(said)) > 1


def test_a_load_sees_what_python_says(images: list[Path]) -> None:
    model: Multimodal = answerer()
    asked = bodies(images, 24, "")
    looks: list[int] = []
    with served(model, slots=2, waiting=1) as address:
        assert ask(address, asked[0]).text == model.chat(asked[0]["messages"], max_tokens=LENGTHS[0])
        seen, seconds = load(address, asked, 6, looks.append)
        with pytest.raises(RuntimeError, match="400"):
            ask(address, {"messages": []})
    for body, each in zip(asked, seen, strict=True):
        assert each.text == model.chat(body["messages"], max_tokens=body["max_tokens"])
        assert 0 < each.first_s <= each.seconds
        assert 1 <= each.tokens <= body["max_tokens"]
    assert sorted(looks) == list(range(24))
    assert summary(seen, seconds)["requests_per_s"] == pytest.approx(24 / seconds)


def test_the_queue_was_full_and_all_were_answered(images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from mmphi.generation.engine import Engine

    step = Engine.step

    def slowly(self: Engine) -> None:
        time.sleep(0.02)
        step(self)

    monkeypatch.setattr(Engine, "step", slowly)
    with served(answerer(), slots=1, waiting=0) as address:
        seen, seconds = load(address, bodies(images, 3, ""), 3)
    assert summary(seen, seconds)["refusals"] > 0
    assert all(each.text for each in seen)


def test_figures_of_what_was_seen() -> None:
    seen = [Seen("a", 10, 0.1, 1.0), Seen("b", 20, 0.3, 3.0, 2), Seen("c", 30, 0.2, 2.0)]
    assert summary(seen, 6.0) == {
        "requests_per_s": 0.5,
        "tokens_per_s": 10.0,
        "first_token_s": 0.2,
        "answer_s": 2.0,
        "late_answer_s": 3.0,
        "refusals": 2.0,
    }


def test_pictures_and_questions_differ(images: list[Path]) -> None:
    asked = bodies(images, 40, "m")
    assert len({json.dumps(body) for body in asked}) > len(images) * len(QUESTIONS)
    assert {body["max_tokens"] for body in asked} == set(LENGTHS)


def test_it_prints_sides_and_ratios(
    tmp_path: Path, images: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def side(name: str, *_: object) -> dict[str, Any]:
        slow = summary([Seen("a", 4, 0.2, 1.0)], 1.0 if name == "mmphi" else 2.0) | {"texts": [name[:1], "b"]}
        return {"1": slow, "8": slow}

    monkeypatch.setattr(assistant, "run_side", side)
    monkeypatch.setattr(assistant, "_random", lambda *_: None)
    assert main(["benchmark", "assistant", "--rounds", "1", "--json", str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out
    assert "2.00x" in said
    assert "1 of 2 answers are the same as those of transformers" in said
    assert set(json.loads((tmp_path / "a.json").read_text())) == set(assistant.SIDES)
    assert main(["benchmark", "assistant", "--model", "x"]) == 2
    assert main(["benchmark", "assistant", "--load", "--images", str(tmp_path / "nothing")]) == 2

    def loaded(*_: object) -> dict[str, Any]:
        return summary([Seen("a", 4, 0.2, 1.0)], 1.0) | {"requests": 1, "wrong": 3, "memory_mb": [10.0, 11.0]}

    monkeypatch.setattr(assistant, "under_load", loaded)
    assert main(["benchmark", "assistant", "--load", "--images", str(images[0].parent)]) == 0
    said = capsys.readouterr().out
    assert "3 wrong" in said
    assert "10 11" in said


@pytest.mark.usefixtures("here")
def test_under_load_answers_are_those_of_the_question_alone(exported: Path, images: list[Path]) -> None:
    found = assistant.under_load(str(exported / "mmphi"), images, 20, 4)
    assert found["wrong"] == 0
    assert len(found["memory_mb"]) >= assistant.LOOKS
    assert all(each > 50 for each in found["memory_mb"])
