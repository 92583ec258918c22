from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import RandomFeatures, tiny_language
from PIL import Image

from mmphi.errors import MmphiError
from mmphi.generation.sampling import SamplingParams
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.serving import chat
from mmphi.serving.chat_session import HELP, ChatSession, EndSession


@pytest.fixture
def talk() -> ChatSession:
    torch.manual_seed(2)
    model = Multimodal(tiny_language(), Projector(ProjectorConfig(RandomFeatures.width, 32)), RandomFeatures())
    return ChatSession(model, SamplingParams(max_tokens=8))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "a photo.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def said(talk: ChatSession, line: str) -> str:
    return "".join(talk.respond(line))


def test_a_question_is_about_the_image_before_it_and_the_next_goes_on(talk: ChatSession, photo: Path) -> None:
    assert "a photo.png" in said(talk, f"/image {photo}")
    first = said(talk, "what is it?")
    assert first == talk.model.ask("what is it?", photo, max_new_tokens=8)
    second = said(talk, "and then?")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert second == talk.model.chat(talk.messages[:3], max_tokens=8)
    said(talk, "/undo")
    assert said(talk, "and then?") == second


def test_an_empty_line_is_a_question_where_something_waits(talk: ChatSession, photo: Path) -> None:
    assert said(talk, "   ") == ""
    assert talk.messages == []
    said(talk, f"/image '{photo}'")
    assert said(talk, "") == talk.model.ask("", photo, max_new_tokens=8)


def test_a_second_image_in_a_conversation_is_warned_about(talk: ChatSession, photo: Path) -> None:
    assert said(talk, f"/image {photo}").endswith("is sent with the next question")
    said(talk, "what is it?")
    assert "/reset starts a new conversation" in said(talk, f"/image {photo}")
    said(talk, "/reset")
    assert "/reset" not in said(talk, f"/image {photo}")


def test_an_image_may_be_given_at_the_start(
    talk: ChatSession, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mmphi.load", lambda *_, **__: talk.model)
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n"))
    assert chat.main(["--model", "x", "--image", str(photo), "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip() == talk.model.ask("what is it?", photo, max_new_tokens=8)


def test_what_is_wrong_leaves_the_conversation_as_it_was(talk: ChatSession, tmp_path: Path) -> None:
    said(talk, "hello")
    before = list(talk.messages)
    (tmp_path / "broken.png").write_bytes(b"no image")
    wrong = (
        f"/image {tmp_path / 'broken.png'}",
        "/image nowhere.png",
        "/image",
        "/set colour red",
        "/set temperature warm",
        "/nonsense",
        "x" * 600,
    )
    pasted = "look \ud83d here", "/system \ud83d", "/image \ud83d", "/set stop \ud83d", "/\ud83d"
    paths = "/image " + "x" * 5000, "/image ~nobody-here/x.png", "/image a\0b", "/set temperature nan"
    for line in (*wrong, *pasted, *paths):
        with pytest.raises(MmphiError):
            said(talk, line)
        assert talk.messages == before
    assert talk.waiting == []
    assert said(talk, "and?") == talk.model.chat(talk.messages[:-1], max_tokens=8)


def test_answers_can_be_set_and_the_beginning_given(talk: ChatSession) -> None:
    said(talk, "/set max_tokens 2")
    assert talk.sampling.max_tokens == 2
    said(talk, "/system Be short.")
    said(talk, "hello")
    assert talk.messages[0] == {"role": "system", "content": "Be short."}
    said(talk, "/reset")
    assert talk.messages == [{"role": "system", "content": "Be short."}]
    said(talk, "/set seed 3")
    said(talk, "/set temperature 1.5")
    first = said(talk, "hello")
    said(talk, "/reset")
    assert said(talk, "hello") == first


def test_a_conversation_is_saved_and_gone_on_with(talk: ChatSession, photo: Path, tmp_path: Path) -> None:
    said(talk, f"/image {photo}")
    said(talk, "what is it?")
    said(talk, f"/save {tmp_path / 'chat.json'}")
    again = ChatSession(talk.model, talk.sampling)
    said(again, f"/load {tmp_path / 'chat.json'}")
    assert said(again, "and then?") == said(talk, "and then?")
    photo.unlink()
    other = ChatSession(talk.model, talk.sampling)
    said(other, f"/load {tmp_path / 'chat.json'}")  # The image is in it.
    assert said(other, "and then?") == talk.messages[-1]["content"]
    lines = ["/load nowhere.json", f"/save {tmp_path}/no/where.json", "/save", "/set seed 99999999999999999999"]
    for number, content in enumerate(('[{"role": "robot"}]', "5", "[1]", "{}", '"text"', "null", "[[]]", "{")):
        (tmp_path / f"{number}.json").write_text(content)
        lines.append(f"/load {tmp_path / f'{number}.json'}")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "surrogate.json").write_text('[{"role": "system", "content": "\\ud83d"}]')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    lines += [f"/load {tmp_path / name}.json" for name in ("deep", "surrogate", "bytes")]
    lines += ["/save a\0b", "/load a\0b", "/save ~nobody-here/x", "/load ~nobody-here/x", "/load " + "x" * 5000]
    before = again.messages
    for line in lines:
        with pytest.raises(MmphiError):
            said(again, line)
    assert again.messages == before


def test_what_is_taken_back_and_loaded_keeps_the_system_text(talk: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"

    def load(*messages: tuple[str, str | None]) -> None:
        path.write_text(json.dumps([{"role": role, "content": text} for role, text in messages]))
        said(talk, f"/load {path}")

    load(("system", "Be short."), ("assistant", "Welcome"))
    assert "no question to remove" in said(talk, "/undo")
    assert len(talk.messages) == 2
    load(("user", "one"), ("user", "two"), ("assistant", None))
    assert talk.messages[0] == {"role": "system", "content": "Be short."}  # The file has none of its own.
    said(talk, f"/save {path}")
    said(talk, "/undo")
    assert [message["role"] for message in talk.messages] == ["system"]
    load(("developer", "Be long."), ("user", "one"), ("assistant", "two"))
    assert talk.messages[0]["content"] == "Be long."


def test_bytes_that_are_no_text_end_no_conversation(
    talk: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mmphi.load", lambda *_, **__: talk.model)
    typed = io.TextIOWrapper(io.BytesIO(b"hello \xff\nand then?\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    assert chat.main(["--model", "x", "--max-tokens", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came(talk: ChatSession) -> None:
    talk.sampling = SamplingParams(max_tokens=100, stop=())
    pieces = talk.respond("hello")
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]  # A generator.
    assert talk.messages[-1] == {"role": "assistant", "content": first}
    assert said(talk, "go on") == talk.model.chat(talk.messages[:-1], max_tokens=100)


def test_help_tells_of_every_command_and_quit_leaves(talk: ChatSession) -> None:
    assert all(command in said(talk, "/help") for command in HELP)
    with pytest.raises(EndSession):
        said(talk, "/quit")


def test_lines_are_answered_until_there_are_no_more(
    talk: ChatSession, photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = talk.model.ask("what is it?", photo, max_new_tokens=8)

    def lines() -> Iterator[str]:
        yield f"/image {photo}\n"
        yield "what is it?\n"
        yield "/image nowhere.png\n"
        yield "/save /proc/nowhere/x.json\n"
        yield "/quit\n"
        yield "never asked\n"

    chat.run(talk, lines())
    printed = capsys.readouterr()
    assert f"\n{expected}\n" in printed.out  # Not line by line: an answer may hold what Python ends lines at.
    assert "nowhere.png" in printed.err
    assert "cannot be written" in printed.err
    assert len(talk.messages) == 2


def test_an_unexpected_error_does_not_end_the_conversation(
    talk: ChatSession, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said(talk, "hello")
    before = list(talk.messages)
    stream = talk.model.stream

    def failing(messages: list, **_: object) -> Iterator[str]:
        yield "half an"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(talk.model, "stream", failing)
    chat.run(talk, iter(["and?\n"]))
    printed = capsys.readouterr()
    assert printed.out == "half an\n"
    assert printed.err == "error: RuntimeError: out of memory\n"
    assert talk.messages == before
    monkeypatch.setattr(talk.model, "stream", stream)
    assert said(talk, "and?") == talk.model.chat(talk.messages[:-1], max_tokens=8)


def test_the_smallest_temperature_is_greedy(talk: ChatSession) -> None:
    greedy = said(talk, "hello")
    said(talk, "/reset")
    said(talk, "/set temperature 3e-38")
    assert said(talk, "hello") == greedy


def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    talk: ChatSession, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def stream(messages: list, **_: object) -> Iterator[str]:
        asked.append(messages)
        yield "half an"
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield " answer"

    monkeypatch.setattr(talk.model, "stream", stream)
    chat.run(talk, iter(["first\n", "second\n"]))
    assert capsys.readouterr().out.split("\n") == ["half an ...", "half an answer", ""]
    assert json.dumps(asked[1]).count("half an") == 1
