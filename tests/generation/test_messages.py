from __future__ import annotations

import base64
import io
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import RandomFeatures, byte_tokenizer, tiny_language
from listening import listening
from PIL import Image

from mmphi.config.shared import VisionSettings
from mmphi.data.schema import ImageRef
from mmphi.errors import ImageError, ModelError
from mmphi.generation import prompt_builder
from mmphi.generation.messages import MAX_IMAGES, MAX_LETTERS, MessageError, parse_messages
from mmphi.generation.prompt_builder import open_prompt
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.models.vision.vision_encoder import VisionReference
from mmphi.text.pieces import PromptPiece
from mmphi.text.prompt import Prompt


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
    asks = Multimodal(*own, vision=VisionReference(VisionSettings(), "random", question="what is it?"))
    for first in ([image(photo)], [text("hi")]):
        wordless = [user(*first), answer("yes"), user(image(photo))]
        worded = [user(*first, *([text("what is it?")] if first[0] == image(photo) else [])), answer("yes")]
        worded.append(user(image(photo), text("what is it?")))
        prompt, _ = open_prompt(asks, parse_messages(wordless), 200)
        same, _ = open_prompt(model, parse_messages(worded), 200)
        assert prompt.input_ids.tolist() == same.input_ids.tolist()


def test_one_question_is_written_as_it_was_in_training(model: Multimodal, photo: Path) -> None:
    prompt, left_out = open_prompt(model, parse_messages([user(image(photo), text("what is it?"))]), 200)
    trained = model.open_prompt(ImageRef(str(photo), photo), "what is it?")
    assert prompt.input_ids.tolist() == trained.input_ids.tolist()
    assert [span[2:] for span in prompt.spans] == [span[2:] for span in trained.spans]
    assert left_out == 0


def test_a_conversation_is_written_as_it_was_in_training(model: Multimodal, photo: Path) -> None:
    messages = [user(image(photo), text("what is it?")), answer("a dog"), user("what colour?")]
    prompt, _ = open_prompt(model, parse_messages(messages), 200)
    parts = model.language.prompt.parts([("what is it?", "a dog"), ("what colour?", None)], images=1)
    assert [i for part in parts for i in part.ids or (0,) * RandomFeatures.tokens] == prompt.input_ids.tolist()


def test_a_later_image_stands_with_its_question(model: Multimodal, photo: Path) -> None:
    messages = [user("hello <image>"), answer("hi"), user(image(photo), text("what is it?"))]
    prompt, _ = open_prompt(model, parse_messages(messages), 200)
    before = model.language.tokenizer.decode(prompt.input_ids[: prompt.spans[0].start].tolist())
    assert before.endswith("hi<|endoftext|>\n")
    assert "hello <image>" in before
    assert len(prompt.spans) == 1


def test_the_system_text_and_the_newest_question_stay(model: Multimodal, photo: Path) -> None:
    messages = [{"role": "system", "content": "Be short."}, user(image(photo), text("first?")), answer("one " * 9)]
    messages += [user("second? " * 4), answer("two"), user("third?")]
    whole, none = open_prompt(model, parse_messages(messages), 250)
    assert none == 0
    cut, left_out = open_prompt(model, parse_messages(messages), len(whole) - 1)
    said = model.language.tokenizer.decode(cut.input_ids.tolist())
    assert left_out == 1
    assert cut.spans == ()
    assert "Be short." in said
    assert "third?" in said
    assert "first?" not in said
    with pytest.raises(ModelError, match="room for 10"):
        open_prompt(model, parse_messages(messages), 10)


def test_bytes_data_uris_and_files_are_the_same_image(photo: Path) -> None:
    data = photo.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    given = [{"type": "image", "image": data}, {"type": "image_url", "image_url": {"url": uri}}, image(photo)]
    found = [parse_messages([user(part)]).images[0][0].content for part in given]
    assert found == [data] * 3
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"sound").decode(), "format": "wav"}}
    assert parse_messages([user(sound)]).audio[0][0].source == b"sound"


def test_other_urls_are_asked_for_only_where_it_is_allowed(photo: Path) -> None:
    asked = []

    def allow(url: str) -> bytes:
        asked.append(url)
        return photo.read_bytes()

    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    assert parse_messages([user(part)], allow=allow).images[0][0].content == photo.read_bytes()
    assert asked == ["https://example.org/a.png"]


@pytest.mark.parametrize("url", ["http://127.0.0.1/a.png", "file:///etc/passwd", "https://example.org/a.png", "a.png"])
def test_no_url_is_fetched_by_itself(url: str) -> None:
    with pytest.raises(MessageError, match="not fetched"):
        parse_messages([user({"type": "image_url", "image_url": {"url": url}})], files=False)


@pytest.mark.parametrize("part", [{"type": "image", "image": "/etc/passwd"}, {"type": "audio", "audio": "/etc/passwd"}])
def test_files_are_not_read_for_others(part: dict[str, str]) -> None:
    with pytest.raises(MessageError, match="message 1: local file paths"):
        parse_messages([user(part)], files=False)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "no message"),
        ("hello", "no message"),
        ([{"content": "x"}], "message 1: it has no role"),
        (["x"], "message 1: it has no role"),
        ([{"role": "robot", "content": "x"}], "role 'robot' is not supported"),
        ([answer("x")], "last message is an answer"),
        ([user("x"), {"role": "tool", "content": "y"}], "message 2: the role 'tool' is not supported"),
        ([user("x"), {**answer("y"), "tool_calls": [{}]}, user("z")], "message 2: calls of tools"),
        ([user({"type": "audio_url", "audio_url": {"url": "http://x/a.wav"}})], "is not fetched"),
        ([user("x"), answer("y")], "last message is an answer"),
        ([{"role": "system", "content": ""}], "no question"),
        ([{"role": "user", "content": "look \ud83d here"}], "surrogate"),
        ([{"role": "system", "content": [{"type": "text", "text": "\udc00"}]}], "surrogate"),
        ([{"role": "user", "content": []}], "message 1: it is empty"),
        ([{"role": "user"}], "message 1: it has no content"),
        ([{"role": "user", "content": 5}], "neither a text nor a list"),
        ([{"role": "user", "content": [1]}], "neither a text nor a list"),
        ([user({"type": "video"})], "type 'video' is unknown"),
        ([user({"type": "text", "text": 5})], "the text of a part is not a string"),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,***"}})], "no base64"),
        ([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}})], "is empty"),
        ([user({"type": "input_audio", "input_audio": {"data": "*"}})], "no base64"),
        ([user({"type": "input_audio"})], "has no data"),
        ([user("x" * (MAX_LETTERS + 1))], "characters"),
        ([user(*[{"type": "image", "image": b"x"}] * (MAX_IMAGES + 1))], "more than 16 images"),
        ([user("x"), {"role": "assistant", "content": [{"type": "image", "image": b"x"}]}], "only in user messages"),
    ],
)
def test_what_cannot_be_read_is_said(messages: Any, why: str) -> None:
    with pytest.raises(MessageError, match=why):
        parse_messages(messages)


def test_images_that_cannot_be_used_and_models_that_do_not_see_are_told(model: Multimodal) -> None:
    with pytest.raises(ImageError):
        open_prompt(model, parse_messages([user({"type": "image", "image": b"no image"})]), 200)
    blind = Multimodal(tiny_language(), None, None)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    with pytest.raises(ModelError, match="accepts no images"):
        open_prompt(blind, parse_messages([user({"type": "image", "image": buffer.getvalue()})]), 200)
    with pytest.raises(ModelError, match="no audio input"):
        open_prompt(blind, parse_messages([user({"type": "audio", "audio": b"x"})]), 200)


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


def test_conversations_are_taken_as_clients_send_them(photo: Path) -> None:
    system = {"role": "system", "content": "Be short."}
    joined = parse_messages([system, user("a"), user(image(photo)), user("b")])
    assert joined.turns == (("a\n\0shown\0\nb", None),)
    assert (joined.system, len(joined.images[0])) == ("Be short.", 1)
    late = parse_messages([user("a"), answer("b"), {"role": "developer", "content": "In English."}, user("c"), system])
    assert late.system == "In English.\nBe short."
    greeted = parse_messages([answer("Hi!"), {"role": "assistant", "content": None}, answer("You?"), user("a")])
    assert greeted.turns == (("", "Hi!\n\nYou?"), ("a", None))
    for empty in (None, ""):
        assert parse_messages([user("a"), answer("b"), {"role": "user", "content": empty}]).turns[-1] == ("", None)
    alone = parse_messages([system, {"role": "developer", "content": "Say hello."}])
    assert (alone.system, alone.turns) == ("", (("Be short.\nSay hello.", None),))


def test_base64_is_read_as_clients_write_it(photo: Path) -> None:
    data = bytes(range(256)) * 3 + b"x"
    plain = base64.b64encode(data).decode()
    lines = "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
    letters = base64.urlsafe_b64encode(data).decode().rstrip("=")
    for text in (plain, lines, letters, f" {plain}"):
        for uri in (f"data:image/png;base64,{text}", f"DATA:;base64,{text}"):
            part: dict[str, Any] = {"type": "image_url", "image_url": {"url": uri}}
            assert parse_messages([user(part)]).images[0][0].content == data
            part = {"type": "audio_url", "audio_url": {"url": uri}}
            assert parse_messages([user(part)]).audio[0][0].source == data
            part = {"type": "input_audio", "input_audio": {"data": uri, "format": "wav"}}
            assert parse_messages([user(part)]).audio[0][0].source == data
        assert parse_messages([user({"type": "image_url", "image_url": uri})]).images[0][0].content == data


def laid_out(model: Multimodal, messages: Any) -> str:
    """A prompt as text, with a sign for each image and recording."""
    prompt, _ = open_prompt(model, parse_messages(messages), 250)
    text, done = "", 0
    for span in prompt.spans:
        text += model.language.tokenizer.decode(prompt.input_ids[done : span.start].tolist()) + f"[{span.kind}]"
        done = span.start + span.length
    return text + model.language.tokenizer.decode(prompt.input_ids[done:].tolist())


def test_base64_is_read_without_holding_other_threads_up() -> None:
    """In functions of C that take as long as the data is; filling in the midst is an error."""
    for data in ("A=" * 50_000, "AAAA=AAA", "é" * 8):
        with pytest.raises(MessageError, match="no base64"):
            parse_messages([user({"type": "image_url", "image_url": {"url": f"data:,{data}"}})])


def test_a_conversation_of_empty_turns_is_not_written_as_a_whole(
    model: Multimodal, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = parse_messages([*[user(""), answer("")] * 5000, user("hi")])
    written = []
    write = prompt_builder._written
    monkeypatch.setattr(prompt_builder, "_written", lambda m, c: written.append(len(c.turns)) or write(m, c))
    sample, left_out = open_prompt(model, said, 64)
    assert len(sample) <= 64
    assert left_out > 4900
    assert max(written) < 200


def test_writing_a_prompt_ends_where_it_is_not_wanted_any_longer(model: Multimodal) -> None:
    def check() -> None:
        raise KeyError("not wanted")

    with pytest.raises(KeyError):
        open_prompt(model, parse_messages([user("hi")]), 64, check=check)


def test_images_and_texts_keep_their_order(model: Multimodal, photo: Path) -> None:
    for parts, expected in (
        ([image(photo), text("a"), text("b")], "[image]\na\nb\n"),
        ([text("a"), image(photo), text("b")], "a\n[image]\nb\n"),
        ([text("a"), image(photo), image(photo)], "a\n[image][image]\n"),
        ([image(photo), text("a"), image(photo)], "[image]\na\n[image]\n"),
    ):
        assert laid_out(model, [user(*parts)]) == f"<|endoftext|>{expected}"


def test_a_mark_that_is_typed_is_a_place_only_where_it_says_the_place_of_all(model: Multimodal, photo: Path) -> None:
    for parts, expected in (
        ([text("is <image> a dog?")], "is <image> a dog?\n"),
        ([image(photo), text("is <image> a dog?")], "is [image] a dog?\n"),
        ([image(photo), image(photo), text("is <image> a dog?")], "[image][image]\nis <image> a dog?\n"),
        ([image(photo), text("<audio>?")], "[image]\n<audio>?\n"),
        ([image(photo), text("\0shown\0?")], "[image]\nshown?\n"),
    ):
        assert laid_out(model, [user(*parts)]) == f"<|endoftext|>{expected}"
    talk = [user(image(photo), text("a")), answer("<image>"), user("what does <image> mean?")]
    assert laid_out(model, talk) == "<|endoftext|>[image]\na\n<image><|endoftext|>\nwhat does <image> mean?\n"
    talk = [user(text("<image>")), answer("b"), user(text("c"), image(photo))]
    assert laid_out(model, talk) == "<|endoftext|><image>\nb<|endoftext|>\nc\n[image]\n"


def test_a_file_that_is_overwritten_is_another_image(model: Multimodal, tmp_path: Path) -> None:
    """Also while the engine remembers what it has read, and where size and time of the file stay the same."""
    path, said, times = tmp_path / "camera.bmp", [], (10**18, 10**18)
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (8, 8), colour).save(path)
        os.utime(path, ns=times)
        asked = [user(image(path), text("what is it?"))]
        fresh = Multimodal(model.language, model.projector, model.features)
        said.append(model.chat(asked, max_tokens=12))
        assert said[-1] == fresh.chat(asked, max_tokens=12)
    assert len(set(said)) == 3


def test_as_many_turns_are_kept_as_fit(model: Multimodal, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    messages: list[dict[str, Any]] = []
    for number in range(20):
        shown = [image(photo)] if rng.random() < 0.3 else []
        messages += [user(*shown, text(f"question {number} " * rng.randint(1, 4))), answer("so " * rng.randint(1, 9))]
    whole = parse_messages([*messages, user("the last one?")])
    written = prompt_builder._written
    for longest in range(20, 1200, 97):
        kept = next(n for n in range(len(whole.turns), 0, -1) if len(written(model, whole.newest(n))) <= longest)
        sample, left_out = open_prompt(model, whole, longest)
        assert left_out == len(whole.turns) - kept
        assert sample.input_ids.tolist() == written(model, whole.newest(kept)).input_ids.tolist()

    letters: list[int] = []

    def noted(own: Multimodal, of: Any) -> Any:
        letters.append(sum(len(question) + len(said or "") for question, said in of.turns))
        return written(own, of)

    monkeypatch.setattr(prompt_builder, "_written", noted)
    long = parse_messages([*[user("a?"), answer("b")] * 20_000, user("c?")])
    open_prompt(model, long, 200)
    assert sum(letters) < 200 * 10  # Of 60,000.


def test_texts_are_encoded_alike_by_all_threads() -> None:
    """A fast tokenizer keeps whether special tokens are split as a setting that all threads share."""
    prompt = tiny_language().prompt

    def encode(number: int) -> bool:
        text = f"{number} <|endoftext|>"
        (split,) = prompt.encoder.parts([PromptPiece(text)])
        (whole,) = prompt.encoder.parts([PromptPiece(text, template=True)])
        return len(split.ids) == len(text) and len(whole.ids) == len(f"{number} ") + 1

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(encode, range(3000)))
    finally:
        sys.setswitchinterval(before)


def test_a_system_text_begins_the_first_question_where_the_template_has_no_such_role() -> None:
    refuses = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    drops = "{% for m in messages %}{% if m.role != 'system' %}"
    last = (  # Before the newest question, as Mistral's.
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
        "{% if m.role != 'system' %}{% if loop.last and s %}{{ s }}: {% endif %}"
    )
    for begin, end in (
        (refuses, "{% endfor %}"),
        (drops, "{% endif %}{% endfor %}"),
        (last, "{% endif %}{% endfor %}"),
    ):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = f"{begin}<{{{{ m.role }}}}>{{{{ m.content }}}}</>{end}"
        parts = Prompt(tokenizer, "chat").parts([("hi", None)], images=1, system="Be short.")
        text = "".join("[image]" if part.span else tokenizer.decode(list(part.ids)) for part in parts)
        assert text == "<user>Be short.\n[image]\nhi</><assistant>"
        parts = Prompt(tokenizer, "chat").parts([("a", "b"), ("c", None)], system="Be short.")
        text = "".join(tokenizer.decode(list(part.ids)) for part in parts)
        assert text.startswith("<user>Be short.\na</>")
        assert text.endswith("<user>c</><assistant>")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    parts = Prompt(tokenizer, "chat").parts([("hi", None)], system="Be short.")
    assert "".join(tokenizer.decode(list(part.ids)) for part in parts) == "<system>Be short.</><user>hi</><assistant>"


def test_the_models_own_generation_settings_change_no_answer(model: Multimodal, photo: Path) -> None:
    asked = [user(image(photo), text("what is it?"))]
    chat, ask = model.chat(asked, max_tokens=12), model.ask("what is it?", photo, max_new_tokens=12)
    drawn = model.sample([(None, "what is it?")], 3, 1.0, 12)
    own = model.language.model.generation_config
    own.repetition_penalty, own.forced_eos_token_id, own.min_p, own.num_beams = 5.0, 65, 0.5, 3
    own.suppress_tokens = list(range(200))
    assert model.chat(asked, max_tokens=12) == chat == ask
    assert model.ask("what is it?", photo, max_new_tokens=12) == chat
    assert model.sample([(None, "what is it?")], 3, 1.0, 12) == drawn
    assert model.language.model.generation_config is own
