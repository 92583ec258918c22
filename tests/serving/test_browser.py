"""The page in headless Chromium with a false microphone and camera."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answerers import HEARD, StepGate, answerer, folder_of, page, recording
from browser import launched
from PIL import Image

from mmphi.models.multimodal import Multimodal
from mmphi.serving.page.examples import of_folder

pytestmark = pytest.mark.browser
SLOW_MS = 60_000


@pytest.fixture(scope="module")
def models() -> dict[str, Multimodal]:
    return {"one": answerer(2), "two": answerer(3)}


@pytest.fixture(scope="module")
def address(models: dict[str, Multimodal], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with page(
        models,
        examples=of_folder(folder_of(tmp_path_factory.mktemp("examples"))),
        questions=lambda _: ["is there a red circle?"],
    ) as found:
        yield found


@pytest.fixture
def tab(address: str, tmp_path: Path) -> Iterator[Any]:
    """A tab with the page in it; nothing but this machine can be reached from it."""
    (tmp_path / "spoken.wav").write_bytes(recording())
    flags = [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={tmp_path / 'spoken.wav'}",
    ]
    with launched(flags) as browser:
        context = browser.new_context(permissions=["microphone", "camera"], viewport={"width": 1280, "height": 1000})
        opened = context.new_page()
        opened.set_default_timeout(SLOW_MS)
        opened.goto(address)
        opened.locator("#send").wait_for()
        yield opened


def last_answer(tab: Any, side: str = "#first") -> str:
    """The last thing that a model said, when nothing more comes."""
    said = tab.locator(f"{side} [data-testid=bot]").last
    said.wait_for()
    text = ""
    for _ in range(100):
        tab.wait_for_timeout(300)
        if text and said.inner_text() == text:
            return text.strip()
        text = said.inner_text()
    raise AssertionError(f"it never ends: {text}")


def test_it_is_typed_to_and_goes_on(tab: Any) -> None:
    tab.locator("#text textarea").fill("hello")
    tab.locator("#send").click()
    assert last_answer(tab)
    assert tab.locator("#text textarea").input_value() == ""
    tab.locator("#text textarea").fill("why?")
    tab.locator("#text textarea").press("Enter")
    tab.locator("#first [data-testid=user]").nth(1).wait_for()
    assert last_answer(tab)
    tab.locator("#clear").click()
    tab.locator("#first [data-testid=user]").first.wait_for(state="detached")


def test_while_it_answers_nothing_else_is_asked_and_clearing_ends_it(tab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = StepGate(monkeypatch)
    gate.permit(1)
    tab.locator("#text textarea").fill("tell me all")
    tab.locator("#send").click()
    tab.locator("#first [data-testid=user]").wait_for()
    tab.locator("#retry").click()
    tab.get_by_text("still answering").wait_for()
    tab.locator("#clear").click()
    gate.permit(2)  # Gradio ends an answer when its next piece comes.
    tab.locator("#first [data-testid=user]").first.wait_for(state="detached")
    tab.wait_for_timeout(1500)  # Nothing of the answer comes back.
    assert tab.locator("#first [data-testid=user]").count() == 0
    gate.open()
    tab.locator("#text textarea").fill("hello")
    tab.locator("#send").click()
    assert last_answer(tab)
    assert tab.locator("#first [data-testid=user]").count() == 1


def test_a_photo_of_the_camera_and_the_microphones_recording(tab: Any) -> None:
    tab.locator("#image").get_by_label("Capture from camera").click()
    tab.locator("#image").get_by_title("grant webcam access").click()
    tab.wait_for_function("document.querySelector('#image video').videoWidth > 0")
    tab.locator("#image").get_by_label("capture photo").click()
    tab.locator("#image img:visible").wait_for()
    tab.locator("#audio").get_by_text("Record", exact=True).first.click()
    tab.wait_for_timeout(1500)
    tab.locator("#audio .stop-button:visible").click()
    tab.locator("#audio audio, #audio .waveform-container").first.wait_for(state="attached")
    tab.wait_for_timeout(1500)
    tab.locator("#send").click()
    assert last_answer(tab)
    tab.locator("#first").get_by_text(f"transcript: {HEARD}").wait_for()
    assert tab.locator("#first img").count() >= 1
    assert tab.locator("#first").get_by_label("Share").count() > 0
    assert not any(button.is_visible() for button in tab.locator("#first").get_by_label("Share").all())


def test_a_click_on_an_example_sends_it(tab: Any) -> None:
    tab.get_by_text("what colour is it?").first.click()
    assert last_answer(tab)
    tab.locator("#first").get_by_text("what colour is it?").first.wait_for()
    assert tab.locator("#first img").count() >= 1
    assert tab.locator("#text textarea").input_value() == ""


def test_errors_are_shown_with_their_text(tab: Any, tmp_path: Path) -> None:
    tab.locator("#send").click()
    tab.get_by_text("Nothing to send").wait_for()
    (tmp_path / "broken.png").write_bytes(b"no image")
    tab.locator("#image input[type=file]").set_input_files(str(tmp_path / "broken.png"))
    tab.locator("#text textarea").fill("what is this?")
    tab.wait_for_timeout(1000)
    tab.locator("#send").click()
    tab.get_by_text("broken.png").first.wait_for()


def test_the_page_says_what_it_is_for_and_what_the_model_was_trained_on(tab: Any) -> None:
    tab.get_by_text("Ask a trained multimodal model").wait_for()
    tab.get_by_text("is there a red circle?").wait_for()


def test_screenshot_shows_question_and_answer(tab: Any, tmp_path: Path) -> None:
    """Kept in the folder that MMPHI_SCREENSHOTS names, for people to look at."""
    tab.get_by_text("what colour is it?").first.click()
    assert last_answer(tab)
    folder = Path(os.environ.get("MMPHI_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=str(folder / "demo.png"))
    with Image.open(folder / "demo.png") as shown:
        assert shown.size == (1280, 1000)
        assert len(shown.convert("RGB").getcolors(2**24)) > 100  # Not an empty page.


def test_nothing_elsewhere_is_asked_for(address: str, tab: Any) -> None:
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.reload()
    tab.locator("#send").wait_for()
    tab.wait_for_timeout(500)
    assert asked
    assert [
        url for url in asked if not url.startswith((address, "data:", "blob:", address.replace("http", "ws")))
    ] == []
