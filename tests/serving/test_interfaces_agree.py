"""One question by every way there is: the same answer."""

from __future__ import annotations

import base64
import contextlib
import inspect
import io
import os
import re
import signal
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
import torch
from answerers import all_ways, picture, recording, served
from PIL import Image

import mmphi
from mmphi.benchmarks._assistant_sides import mmphi_server, serving
from mmphi.cli import main
from mmphi.data.audio import RATE
from mmphi.errors import MmphiError
from mmphi.generation.engine import Engine
from mmphi.generation.sampling import SamplingParams
from mmphi.models.audio.whisper_backends import OpenAIWhisper
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.stage import Result
from mmphi.serving.page.model_pool import ModelPool, PageConversation, PageTurn
from mmphi.serving.scheduler import Scheduler

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
from small import built, settings


@pytest.fixture(scope="module")
def projector(tmp_path_factory: pytest.TempPathFactory, small_chain: Path) -> Iterator[Result]:
    with built("projector", small_chain, tmp_path_factory.mktemp("ways")) as pipeline:
        yield Pipeline(pipeline.stages).build("projector", settings())


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 3.6 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def cut() -> bytes:
    """The first half of a JPEG."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def sound(samples: np.ndarray, rate: int) -> bytes:
    """A WAV file, of 32-bit floats or of bytes."""
    size, wide = samples.nbytes, samples.itemsize
    form = struct.pack("<HHIIHH", 3 if wide == 4 else 1, 1, rate, rate * wide, wide, 8 * wide)
    parts = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", len(parts) + size) + parts + samples.tobytes()


BAD = {
    "bomb.png": (bomb, "pixels"),
    "cut.jpg": (cut, "cut.jpg|truncated"),
    "nan.wav": (lambda: sound(np.full(RATE, np.nan, "<f4"), RATE), "finite|NaN|not a number"),
    "hours.wav": (lambda: sound(np.full(5 * 3600 * 1000, 128, np.uint8), 1000), "hour|18000|seconds"),
    "none.wav": (lambda: b"", "empty|none.wav"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_seen_or_heard_is_told_by_every_way(
    projector: Result, tmp_path: Path, tiny_whisper: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, why = BAD[name]
    path = tmp_path / name
    path.write_bytes(make())
    kind = "image" if path.suffix != ".wav" else "audio"
    model = mmphi.load(projector.path, whisper=str(tiny_whisper))
    with pytest.raises(MmphiError, match=why):
        model.chat([{"role": "user", "content": [{"type": kind, kind: path}]}])
    capsys.readouterr()
    assert main(["ask", "--model", str(projector.path), "--whisper", str(tiny_whisper), f"--{kind}", str(path)]) == 2
    assert re.search(why, capsys.readouterr().err)

    data = base64.b64encode(path.read_bytes()).decode()
    part = {"image": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}}
    part["audio"] = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    with served(model) as address:
        body = {"messages": [{"role": "user", "content": [part[kind]]}]}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]
        ok = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        assert httpx.post(f"{address}/v1/chat/completions", json=ok, timeout=60).status_code == 200

    pool = ModelPool(lambda _: Scheduler(Engine(model, 1)))
    talk = PageConversation("", [PageTurn("what?", **{kind: str(path)})])
    list(pool.ask("me", [talk], "", SamplingParams(max_tokens=2)))
    pool.close()
    assert re.search(why, talk.turns[0].problem)


@pytest.mark.slow
def test_a_server_that_was_killed_answers_as_before_when_it_is_back(projector: Result) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}
    answers = []
    for _ in "12":
        with serving(mmphi_server(str(projector.path), 2)) as (address, process):
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
            answers.append(answer["choices"][0]["message"]["content"])
            long = body | {"max_tokens": 400, "stream": True}
            with (
                contextlib.suppress(httpx.HTTPError),  # What was under way is lost, unless it was said already.
                httpx.stream("POST", f"{address}/v1/chat/completions", json=long, timeout=60) as lines,
            ):
                for _ in lines.iter_lines():
                    os.kill(process, signal.SIGKILL)
    assert answers[0] == answers[1]


def test_photo_speech_and_text_get_the_same_answer_by_every_way(
    projector: Result,
    tmp_path: Path,
    tiny_whisper: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "photo.png").write_bytes(picture())
    (tmp_path / "question.wav").write_bytes(recording())
    # Noise stands for a question here: speech is no part of the repository.
    monkeypatch.setattr("mmphi.generation.prompt_builder._check_speech", lambda *_: None)
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


def test_a_recording_without_speech_is_reported_and_not_answered(
    projector: Result, tmp_path: Path, tiny_whisper: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "noise.wav").write_bytes(recording())
    words = ["--model", str(projector.path), "--whisper", str(tiny_whisper), "--audio", str(tmp_path / "noise.wav")]
    assert main(["ask", *words, "what is it?"]) == 2
    shown = capsys.readouterr()
    assert "no speech was found in the recording" in shown.err
    assert shown.out == ""
    model = mmphi.load(projector.path, whisper=str(tiny_whisper))
    with served(model) as address:
        part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(recording()).decode(), "format": "wav"}}
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 4}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert "no speech" in answer.json()["error"]["message"]


def test_a_whisper_that_cannot_be_had_is_the_servers_fault(
    projector: Result, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("whisper.load_model", unreachable)
    with served(mmphi.load(projector.path, whisper="base.en")) as address:
        part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(recording()).decode(), "format": "wav"}}
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 4}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 500
    assert "--whisper FILE.pt" in answer.json()["error"]["message"]
    assert "MMPHI_MODELS" in answer.json()["error"]["message"]


def test_a_whisper_in_the_folder_of_models_needs_no_network(
    tiny_whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whisper._download", lambda *_: pytest.fail("it was downloaded"))
    (tmp_path / "whisper-base.en.pt").write_bytes(tiny_whisper.read_bytes())
    monkeypatch.setenv("MMPHI_MODELS", str(tmp_path))
    assert OpenAIWhisper("base.en", torch.device("cpu")).name == "base.en"
