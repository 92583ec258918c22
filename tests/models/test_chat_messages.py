from __future__ import annotations

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import RandomFeatures, tiny_language
from listening import listening
from PIL import Image

from mmphi.data.records import ImageRef
from mmphi.errors import ImageError, ModelError
from mmphi.models.chat.messages import MAX_IMAGES, MAX_LETTERS, MessageError, conversation, kept_image
from mmphi.models.chat.prompts import open_prompt
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.models.vision import Vision
from mmphi.settings.shared import VisionSettings


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


@pytest.fixture
def model() -> Multimodal:
    torch.manual_seed(2)
    return Multimodal(tiny_language(), Projector(ProjectorConfig(RandomFeatures.width, 32)), RandomFeatures())


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def image(path: Path) -> dict[str, Any]:
    return {"type": "image", "image": path}


def answer(said: str) -> dict[str, str]:
    return {"role": "assistant", "content": said}


def test_images_alone_are_asked_about_as_in_training(model: Multimodal, photo: Path) -> None:
    own = model.language, model.projector, model.features
    asks = Multimodal(*own, vision=Vision(VisionSettings(), "random", question="what is it?"))
    for first in ([image(photo)], [text("hi")]):
        wordless = [user(*first), answer("yes"), user(image(photo))]
        worded = [user(*first, *([text("what is it?")] if first[0] == image(photo) else [])), answer("yes")]
        worded.append(user(image(photo), text("what is it?")))
        prompt, _ = open_prompt(asks, conversation(wordless), 200)
        same, _ = open_prompt(model, conversation(worded), 200)
        assert prompt.input_ids.tolist() == same.input_ids.tolist()


def test_one_question_is_written_as_it_was_in_training(model: Multimodal, photo: Path) -> None:
    prompt, left_out = open_prompt(model, conversation([user(image(photo), text("what is it?"))]), 200)
    trained = model.open_prompt(ImageRef(str(photo), photo), "what is it?")
    assert prompt.input_ids.tolist() == trained.input_ids.tolist()
    assert prompt.spans == trained.spans
    assert left_out == 0


def test_a_conversation_is_written_as_it_was_in_training(model: Multimodal, photo: Path) -> None:
    messages = [user(image(photo), text("what is it?")), answer("a dog"), user("what colour?")]
    prompt, _ = open_prompt(model, conversation(messages), 200)
    parts = model.language.prompt.parts([("what is it?", "a dog"), ("what colour?", None)], images=1)
    assert [i for part in parts for i in part.ids or (0,) * RandomFeatures.tokens] == prompt.input_ids.tolist()


def test_a_later_image_stands_with_its_question(model: Multimodal, photo: Path) -> None:
    messages = [user("hello <image>"), answer("hi"), user(image(photo), text("what is it?"))]
    prompt, _ = open_prompt(model, conversation(messages), 200)
    before = model.language.tokenizer.decode(prompt.input_ids[: prompt.spans[0].start].tolist())
    assert before.endswith("hi<|endoftext|>\n")
    assert "hello (image)" in before
    assert len(prompt.spans) == 1


def test_the_system_text_and_the_newest_question_stay(model: Multimodal, photo: Path) -> None:
    messages = [{"role": "system", "content": "Be short."}, user(image(photo), text("first?")), answer("one " * 9)]
    messages += [user("second? " * 4), answer("two"), user("third?")]
    whole, none = open_prompt(model, conversation(messages), 250)
    assert none == 0
    cut, left_out = open_prompt(model, conversation(messages), len(whole) - 1)
    said = model.language.tokenizer.decode(cut.input_ids.tolist())
    assert left_out == 1
    assert cut.spans == ()
    assert "Be short." in said
    assert "third?" in said
    assert "first?" not in said
    with pytest.raises(ModelError, match="room for 10"):
        open_prompt(model, conversation(messages), 10)


def test_bytes_data_uris_and_files_are_the_same_image(photo: Path) -> None:
    data = photo.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    given = [{"type": "image", "image": data}, {"type": "image_url", "image_url": {"url": uri}}, image(photo)]
    found = [conversation([user(part)]).images[0][0].path.read_bytes() for part in given]
    assert found == [data] * 3
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"sound").decode(), "format": "wav"}}
    assert conversation([user(sound)]).audio[0][0].source == b"sound"


def test_other_urls_are_asked_for_only_where_it_is_allowed(photo: Path) -> None:
    asked = []

    def allow(url: str) -> bytes:
        asked.append(url)
        return photo.read_bytes()

    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    assert conversation([user(part)], allow=allow).images[0][0].path.read_bytes() == photo.read_bytes()
    assert asked == ["https://example.org/a.png"]


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.png", "file:///etc/passwd", "https://example.org/a.png", "a.png"])
def test_no_url_is_fetched_by_itself(url: str) -> None:
    with pytest.raises(MessageError, match="not fetched"):
        conversation([user({"type": "image_url", "image_url": {"url": url}})], files=False)


@pytest.mark.parametrize("part", [{"type": "image", "image": "/etc/passwd"}, {"type": "audio", "audio": "/etc/passwd"}])
def test_files_are_not_read_for_others(part: dict[str, str]) -> None:
    with pytest.raises(MessageError, match="message 1: files"):
        conversation([user(part)], files=False)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "no message"),
        ("hello", "no message"),
        ([{"content": "x"}], "message 1: it has no role"),
        (["x"], "message 1: it has no role"),
        ([{"role": "robot", "content": "x"}], "role 'robot' is unknown"),
        ([answer("x")], "answer follows no question"),
        ([user("x"), answer("y")], "last message is an answer"),
        ([{"role": "system", "content": "x"}], "no question"),
        ([user("x"), {"role": "system", "content": "x"}], "message 2: .* comes first"),
        ([user("x"), user("y")], "message 2: a question follows a question"),
        ([user("")], "message 1: it is empty"),
        ([{"role": "user", "content": None}], "neither a text nor a list"),
        ([{"role": "user", "content": [1]}], "neither a text nor a list"),
        ([user({"type": "video"})], "type 'video' is unknown"),
        ([user({"type": "text", "text": 5})], "a text is no text"),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,***"}})], "no base64"),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}})], "is empty"),
        ([user({"type": "input_audio", "input_audio": {"data": "*"}})], "no base64"),
        ([user({"type": "input_audio"})], "has no data"),
        ([user("x" * (MAX_LETTERS + 1))], "letters"),
        ([user(*[{"type": "image", "image": b"x"}] * (MAX_IMAGES + 1))], "at most 16"),
        ([user("x"), {"role": "assistant", "content": [{"type": "image", "image": b"x"}]}], "only a user's message"),
    ],
)
def test_what_cannot_be_read_is_said(messages: Any, why: str) -> None:
    with pytest.raises(MessageError, match=why):
        conversation(messages)


def test_images_that_cannot_be_used_and_models_that_do_not_see_are_told(model: Multimodal) -> None:
    with pytest.raises(ImageError):
        open_prompt(model, conversation([user({"type": "image", "image": b"no image"})]), 200)
    blind = Multimodal(tiny_language(), None, None)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    with pytest.raises(ModelError, match="sees nothing"):
        open_prompt(blind, conversation([user({"type": "image", "image": buffer.getvalue()})]), 200)
    with pytest.raises(ModelError, match="hear"):
        open_prompt(blind, conversation([user({"type": "audio", "audio": b"x"})]), 200)


def test_chat_is_ask_and_goes_on(model: Multimodal, photo: Path) -> None:
    said = model.chat([user(image(photo), text("what is it?"))], max_tokens=12)
    assert said == model.ask("what is it?", photo, max_new_tokens=12)
    messages = [user(image(photo), text("what is it?")), answer(said), user("and what else?")]
    pieces = list(model.stream(messages, max_tokens=12))
    assert len(pieces) > 1
    fresh = Multimodal(model.language, model.projector, model.features)
    assert "".join(pieces) == fresh.chat(messages, max_tokens=12)


def test_a_spoken_question_is_answered_as_the_typed_one(photo: Path) -> None:
    model = listening()
    spoken = {"type": "audio", "audio": Path("q")}
    said = model.chat([user(image(photo), {"type": "text", "text": ""}, spoken)], max_tokens=12)
    assert said == model.chat([user(image(photo), text("What is shown?"))], max_tokens=12)


def test_one_image_may_be_sent_by_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads as a server reads questions in, all of them between writing the file and naming it."""
    several = 4
    together, real = threading.Barrier(several), Path.write_bytes

    def write(path: Path, data: bytes) -> int:
        count = real(path, data)
        together.wait(20)
        return count

    monkeypatch.setattr(Path, "write_bytes", write)
    content = b"an image that nobody sent before"
    with ThreadPoolExecutor(several) as pool:
        kept = list(pool.map(kept_image, [content] * several))
    assert len({each.path for each in kept}) == 1
    assert kept[0].path.read_bytes() == content
    assert list(kept[0].path.parent.glob("*.part")) == []
