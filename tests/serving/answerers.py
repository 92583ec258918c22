"""A model that hears the same in every recording, files for it, and the page of it, for tests of all ways to ask."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import uuid
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pandas as pd
import pytest
import torch
from builders import RandomFeatures, tiny_language
from listening import Knows
from PIL import Image

import mmphi
from mmphi.benchmarks._assistant_sides import free_port
from mmphi.cli import main
from mmphi.data.schema import AudioRef
from mmphi.generation.engine import Engine
from mmphi.generation.sampling import SamplingParams
from mmphi.models.audio.audio_features import TranscriptFeatures
from mmphi.models.audio.transcription import Segment, Transcript
from mmphi.models.multimodal import Multimodal
from mmphi.models.projector import Projector, ProjectorConfig
from mmphi.serving import demo, pyfunc, serve
from mmphi.serving.api import ServerConfig
from mmphi.serving.page.layout import CSS, PageConfig, build_page, theme
from mmphi.serving.page.model_pool import ModelPool
from mmphi.serving.scheduler import Scheduler

HEARD = "what is shown"


class Same(Knows):
    """Ears that hear :data:`HEARD` in everything."""

    def transcripts(self, recordings: Sequence[AudioRef], check: Any = None) -> list[Transcript]:
        return [Transcript((Segment(0, 1, HEARD),), "en") for _ in recordings]


def answerer(seed: int = 2) -> Multimodal:
    """A model that sees and hears; another seed, another language model and projector."""
    language = tiny_language(seed - 2)
    torch.manual_seed(seed)
    projector = Projector(ProjectorConfig(RandomFeatures.width, language.width))
    return Multimodal(language, projector, RandomFeatures(), audio_source=TranscriptFeatures(language, Same()))


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


def recording() -> bytes:
    """A second of noise as a WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.random.default_rng(0).integers(-3000, 3000, 16000, dtype=np.int16).tobytes())
    return buffer.getvalue()


def desk_of(models: dict[str, Multimodal], slots: int = 2, limit_s: float = 0.0) -> ModelPool:
    """A desk at which these models answer."""
    return ModelPool(lambda name: Scheduler(Engine(models[name], slots), 4, limit_s))


class StepGate:
    """Lets every engine make only as many decoding steps as a test permits, until the gate is opened.

    An answer therefore lasts until the test has seen what it waits for, on any machine.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._permits, self._opened = threading.Semaphore(0), threading.Event()
        step: Callable[[Engine], None] = Engine.step

        def gated(engine: Engine) -> None:
            if self._opened.is_set() or self._permits.acquire(timeout=0.01):
                step(engine)

        monkeypatch.setattr(Engine, "step", gated)

    def permit(self, steps: int) -> None:
        self._permits.release(steps)

    def open(self) -> None:
        self._opened.set()


def wait_until(happened: Callable[[], bool], limit_s: float = 120) -> None:
    """Poll a state; the limit only ends a test that would hang."""
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end, "the state was never reached"
        time.sleep(0.02)


@contextmanager
def served(model: Multimodal, rules: ServerConfig | None = None, **how: Any) -> Iterator[str]:
    """A server in a thread; yields its address."""
    port = free_port()
    app = serve.application_of(model, rules or ServerConfig("tiny"), **how)
    server = serve.server_of(app, "127.0.0.1", port, 72)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def page(models: dict[str, Multimodal], beside: str = "", most: int = 8, **look: Any) -> Iterator[str]:
    """The page of some models, served; yields its address."""
    pool = desk_of(models)
    names = [(f"model {name}", name) for name in models]
    made = build_page(
        pool, PageConfig(lambda: names, next(iter(models)), beside, sampling=SamplingParams(max_tokens=most), **look)
    )
    _, address, _ = made.queue().launch(
        server_name="127.0.0.1",
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        max_file_size=10**6,
        theme=theme(),
        css=CSS,
        show_error=True,
        footer_links=[],
    )
    try:
        yield str(address).rstrip("/")
    finally:
        made.close()
        pool.close()


class Visitor:
    """Somebody on the page, without a browser: says what the page's own script would say to the server.

    Args:
        address: Of the page.
    """

    def __init__(self, address: str) -> None:
        self.address = f"{address}/gradio_api"
        self.session = uuid.uuid4().hex  # Not `id(self)`: that of somebody who has left is given again.
        config = httpx.get(f"{address}/config").json()
        self.parts = {part["id"]: part["props"] for part in config["components"]}
        self.ids = {props["elem_id"]: number for number, props in self.parts.items() if props.get("elem_id")}
        self.dependencies = config["dependencies"]

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        """A file as the page's components have it."""
        answer = httpx.post(f"{self.address}/upload", files={"files": (name, data)})
        answer.raise_for_status()
        return {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def join(self, button: str, **fields: Any) -> str:
        """Press a button with some fields filled in, and wait for nothing; returns the event's name."""
        target = next(d for d in self.dependencies if any(t[0] == self.ids[button] for t in d["targets"]))
        filled = {self.ids[name]: value for name, value in fields.items()}
        given = [filled.get(number, self.parts[number].get("value")) for number in target["inputs"]]
        body = {"data": given, "fn_index": target["id"], "session_hash": self.session, "trigger_id": self.ids[button]}
        joined = httpx.post(f"{self.address}/queue/join", json=body, timeout=60).raise_for_status()
        return str(joined.json()["event_id"])

    def events(self) -> Iterator[dict[str, Any]]:
        """What the server says from now on."""
        url = f"{self.address}/queue/data?session_hash={self.session}"
        with httpx.stream("GET", url, timeout=60) as lines:
            for line in lines.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    def press(self, button: str, **fields: Any) -> list[Any]:
        """Press a button with some fields filled in; returns what is shown at the end, or raises."""
        self.join(button, **fields)
        shown: list[Any] = []
        for event in self.events():
            if event["msg"] == "process_completed":
                if not event["success"]:
                    raise RuntimeError(event["output"]["error"])
                return shown or event["output"]["data"]
            if event["msg"] == "process_generating":
                shown = merged(shown, event["output"]["data"])
        raise RuntimeError("the page said nothing")


def merged(shown: list[Any], news: list[Any]) -> list[Any]:
    """What is shown after news of it: whole at first, changes after."""
    if not shown:
        return news
    from gradio_client.utils import apply_diff

    return [apply_diff(one, other) for one, other in zip(shown, news, strict=True)]


def folder_of(path: Path) -> Path:
    """A folder with a photo, a recording and a question."""
    path.mkdir(exist_ok=True)
    (path / "a.png").write_bytes(picture())
    (path / "a.wav").write_bytes(recording())
    (path / "a.txt").write_text("what colour is it?\n")
    (path / "b.png").write_bytes(picture("blue"))
    return path


WORDS = 8  # Longest answer of all ways, in tokens.


def all_ways(
    model: Path, image: Path, audio: Path, text: str, whisper: str, capsys: Any, monkeypatch: Any
) -> dict[str, str]:
    """What a model says to a photo, a recording and typed text in one question, by the way it is asked.

    Args:
        model: Its folder.
        image: The photo.
        audio: The recording.
        text: What is typed.
        whisper: Who hears.
        capsys: Of pytest.
        monkeypatch: Of pytest.
    """
    loaded = mmphi.load(model, whisper=whisper)
    parts = [{"type": "image", "image": image}, {"type": "audio", "audio": audio}, {"type": "text", "text": text}]
    found = {"python": loaded.chat([{"role": "user", "content": parts}], max_tokens=WORDS)}

    common = ["--model", str(model), "--whisper", whisper, "--max-tokens", str(WORDS)]
    capsys.readouterr()
    assert main(["ask", *common, "--image", str(image), "--audio", str(audio), text]) == 0
    found["ask"] = capsys.readouterr().out.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {image}\n/audio {audio}\n{text}\n"))
    assert main(["chat", *common]) == 0
    found["chat"] = "\n".join(capsys.readouterr().out.splitlines()[2:]).strip()

    data = {path: base64.b64encode(path.read_bytes()).decode() for path in (image, audio)}
    sent = [
        {"type": "image_url", "image_url": {"url": f"data:image/{image.suffix[1:]};base64,{data[image]}"}},
        {"type": "input_audio", "input_audio": {"data": data[audio], "format": audio.suffix[1:]}},
        {"type": "text", "text": text},
    ]
    with served(loaded) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        messages: Any = [{"role": "user", "content": sent}]
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=WORDS)
        found["http"] = str(answer.choices[0].message.content)
        stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=WORDS, stream=True)
        found["http, streamed"] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with demo.serve_page(demo.parser().parse_args([*common, "--port", str(free_port())])) as address:
        visitor = Visitor(address)
        files = {"image": visitor.upload(image.name, image.read_bytes())}
        files["audio"] = visitor.upload(audio.name, audio.read_bytes())
        shown = visitor.press("send", text=text, **files)[3]
        found["page"] = shown["value"][1]["content"][0]["text"]

    row = pd.DataFrame([{"question": text, "image": data[image], "audio": data[audio]}])
    found["mlflow"] = pyfunc.ChatPythonModel(loaded).predict(row, {"max_tokens": WORDS})["answer"][0]
    return found
