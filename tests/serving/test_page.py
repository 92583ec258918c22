"""The page as a browser's script sees it; ``test_browser.py`` has a browser."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answerers import HEARD, StepGate, Visitor, answerer, page, picture, recording

from mmphi.cli import main
from mmphi.models.multimodal import Multimodal
from mmphi.serving import demo
from mmphi.serving.serve import KEY


@pytest.fixture(scope="module")
def models() -> dict[str, Multimodal]:
    return {"one": answerer(2), "two": answerer(3)}


@pytest.fixture(scope="module")
def address(models: dict[str, Multimodal]) -> Iterator[str]:
    with page(models) as found:
        yield found


@pytest.fixture
def visitor(address: str) -> Visitor:
    return Visitor(address)


def texts(shown: dict[str, Any]) -> list[list[str]]:
    """What each message of a chat says."""
    messages = shown["value"] if isinstance(shown, dict) else shown
    return [[part["text"] for part in message["content"] if part["type"] == "text"] for message in messages]


def as_shown(answer: str) -> str:
    """What gradio makes of a text: tabs are spaces."""
    return inspect.cleandoc(answer)


def test_a_photo_a_recording_and_text_get_pythons_answer(
    models: dict[str, Multimodal], visitor: Visitor, tmp_path: Path
) -> None:
    image, audio = visitor.upload("photo.png", picture()), visitor.upload("question.wav", recording())
    shown = visitor.press("send", text="tell me", image=image, audio=audio)
    assert shown[:3] == ["", None, None]  # The fields are free for the next question.
    parts = [
        {"type": "image", "image": image["path"]},
        {"type": "audio", "audio": recording()},
        {"type": "text", "text": "tell me"},
    ]
    answer = models["one"].chat([{"role": "user", "content": parts}], max_tokens=8)
    assert texts(shown[3]) == [["tell me", f"transcript: {HEARD}"], [as_shown(answer)]]
    files = [part["file"] for part in shown[3]["value"][0]["content"] if part["type"] == "file"]
    assert [file["mime_type"].partition("/")[0] for file in files] == ["image", "audio"]


def test_questions_go_on_and_are_asked_again_and_cleared(models: dict[str, Multimodal], visitor: Visitor) -> None:
    first = visitor.press("send", text="hello")
    second = visitor.press("send", text="why?")
    said = texts(second[3])
    assert said[:2] == texts(first[3])
    messages = [
        {"role": role, "content": "\n".join(text)}
        for role, text in zip(("user", "assistant", "user"), said, strict=False)
    ]
    assert said[3] == [as_shown(models["one"].chat(messages, max_tokens=8))]
    assert texts(visitor.press("retry")[0]) == said
    assert texts(visitor.press("clear")[0]) == []
    assert len(texts(visitor.press("send", text="why?")[3])) == 2


def test_what_is_cleared_stays_so_though_nobody_cancelled_the_answer(
    visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = StepGate(monkeypatch)
    gate.permit(2)
    asked, cleared = visitor.join("send", text="tell me all"), ""
    ended: list[str] = []
    for event in visitor.events():
        if event["msg"] == "process_generating":
            assert event["event_id"] == asked
            cleared = cleared or visitor.join("clear")
        if event["msg"] == "process_completed":
            ended.append(event["event_id"])
            if event["event_id"] == asked:  # Gradio sends the last output once more: it changes nothing that is shown.
                assert event["output"]["data"][:5] == [{"__type__": "update"}] * 5
            if event["event_id"] == cleared:
                assert texts(event["output"]["data"][0]) == []
                gate.open()
        if len(ended) == 2:
            break
    # The answer ends at its next piece, which may come before or after the page is cleared: neither shows it again.
    assert set(ended) == {cleared, asked}
    with pytest.raises(RuntimeError, match="no question to repeat"):
        visitor.press("retry")


def test_another_model_answers_beside_it(models: dict[str, Multimodal], visitor: Visitor) -> None:
    shown = visitor.press("beside", model="one", beside="two")
    assert shown[1]["visible"]
    assert shown[1]["label"] == "model two"
    shown = visitor.press("send", text="hello")
    asked = [{"role": "user", "content": "hello"}]
    for number, model in enumerate(models.values()):
        assert texts(shown[3 + number])[1] == [as_shown(model.chat(asked, max_tokens=8))]


def test_what_is_wrong_is_shown(visitor: Visitor) -> None:
    with pytest.raises(RuntimeError, match="type a question"):
        visitor.press("send", text="  ")
    with pytest.raises(RuntimeError, match="no question to repeat"):
        visitor.press("retry")
    with pytest.raises(RuntimeError, match="minimum value"):
        visitor.press("send", text="hello", top_p=-1)
    shown = visitor.press("send", text="hello", image=visitor.upload("a.png", picture()[:80]))
    assert "⚠" in texts(shown[3])[1][0]
    assert texts(visitor.press("send", text="hello")[3])[3] != []


def test_files_that_nobody_uploaded_and_large_ones_are_refused(visitor: Visitor, tmp_path: Path) -> None:
    import httpx2 as httpx

    secret = Path(__file__)
    with pytest.raises(RuntimeError):
        visitor.press("send", text="x", image={"path": str(secret), "meta": {"_type": "gradio.FileData"}})
    with pytest.raises(httpx.HTTPStatusError):
        visitor.upload("large.png", b"x" * (10**6 + 1))


def test_nothing_is_fetched_from_elsewhere(address: str) -> None:
    import httpx2 as httpx

    body = httpx.get(address).text
    assert "googleapis" not in body
    assert "cdnjs" not in body


def test_a_page_for_others_needs_a_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(KEY, raising=False)
    assert main(["demo", "--host", "0.0.0.0"]) == 2
    assert KEY in capsys.readouterr().err


def test_what_is_wrong_with_the_model_is_said_before_the_page_is_there(
    empty_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo"]) == 2
    assert "mmphi projector" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        demo.main(["--help"])
