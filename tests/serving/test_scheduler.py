"""The threads behind a server: errors end single requests, and a state that only a restart fixes is reported."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from answerers import StepGate, answerer, free_port, picture, recording, served, wait_until

from mmphi.data.schema import ImageRef
from mmphi.errors import AudioError
from mmphi.generation.detokenizer import IncrementalDetokenizer
from mmphi.generation.engine import Engine
from mmphi.generation.messages import parse_messages
from mmphi.generation.sampling import SamplingParams
from mmphi.models.multimodal import Multimodal
from mmphi.serving import scheduler, serve
from mmphi.serving.scheduler import QueuedRequest, RequestTimeoutError, Scheduler

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model() -> Multimodal:
    return answerer()


@pytest.fixture
def working(model: Multimodal) -> Iterator[Scheduler]:
    made = Scheduler(Engine(model, 2), waiting=1)
    made.start()
    yield made
    made.stop()


class Asked:
    """A request, and what came of it."""

    def __init__(self, worker: Scheduler, tokens: int = 4, messages: Any = HELLO) -> None:
        self.pieces: list[str] = []
        self.ended = threading.Event()
        self.queued = QueuedRequest(parse_messages(messages), SamplingParams(max_tokens=tokens), self.tell)
        worker.submit(self.queued)

    def tell(self, piece: str | None) -> None:
        if piece is None:
            self.ended.set()
        else:
            self.pieces.append(piece)

    def answer(self) -> str:
        assert self.ended.wait(60)
        return "".join(self.pieces).strip()


def test_an_error_of_the_engine_ends_the_open_requests_only(
    model: Multimodal, working: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Engine) -> None:
        raise RuntimeError("an error that no answer has caused")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", broken)
        failed = Asked(working)
        assert failed.answer() == ""
        assert "no answer has caused" in str(failed.queued.error)
    assert working.problem == ""
    assert Asked(working).answer() == model.chat(HELLO, max_tokens=4)


def test_an_answer_that_the_model_breaks_off_has_the_status_500(
    model: Multimodal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its first token, too; the next request is answered."""
    forward = Engine._forward
    steps: list[int] = []

    def broken(engine: Engine, *given: Any) -> Any:
        steps.append(1)
        return forward(engine, *given) * (torch.nan if len(steps) == 3 else 1.0)

    with served(model, slots=1) as address:
        url, body = f"{address}/v1/chat/completions", {"messages": HELLO, "max_tokens": 8}
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_forward", broken)
            answer = httpx.post(url, json=body, timeout=60)
        assert answer.status_code == 500
        assert "logits are NaN" in answer.json()["error"]["message"]
        content = httpx.post(url, json=body, timeout=60).json()["choices"][0]["message"]["content"]
        assert content == model.chat(HELLO, max_tokens=8)


def test_an_answer_whose_text_cannot_be_made_ends_alone(
    model: Multimodal, working: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: IncrementalDetokenizer) -> str:
        raise ValueError("no text")

    with monkeypatch.context() as patch:
        patch.setattr(IncrementalDetokenizer, "take", broken)
        failed = Asked(working)
        failed.answer()
        assert "no text" in str(failed.queued.error)
    assert working.problem == ""
    assert Asked(working).answer() == model.chat(HELLO, max_tokens=4)


def spoken(*recordings: bytes) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "audio", "audio": each} for each in recordings]}]


class Hearing:
    """Holds whoever hears until a test lets go, and calls the check meanwhile, as real ones do."""

    def __init__(self, model: Multimodal, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        inputs = Multimodal.inputs

        def held(own: Multimodal, recordings: Any, check: Any = lambda: None) -> Any:
            if recordings:
                self.entered.set()
                while not self.released.wait(0.01):
                    check()
            return inputs(own, recordings, check)

        monkeypatch.setattr(Multimodal, "inputs", held)


def test_text_and_images_do_not_wait_for_a_recording(
    model: Multimodal, working: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio_source = Hearing(model, monkeypatch)
    heard = Asked(working, messages=spoken(recording()))
    assert audio_source.entered.wait(60)
    assert Asked(working).answer() == model.chat(HELLO, max_tokens=4)
    shown = [{"role": "user", "content": [{"type": "image", "image": picture()}]}]
    assert Asked(working, messages=shown).answer() == model.chat(shown, max_tokens=4)
    assert not heard.ended.is_set()
    audio_source.released.set()
    heard.answer()
    assert heard.queued.error is None


def test_whoever_leaves_is_let_go_of_while_prepared_and_while_waiting_for_that(
    model: Multimodal, working: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio_source = Hearing(model, monkeypatch)
    first, second = (Asked(working, messages=spoken(recording())) for _ in range(2))
    assert audio_source.entered.wait(60)
    working.leave(second.queued)
    assert second.answer() == ""
    assert not any(second.queued.conversation.audio)  # It waits in its lane still, and holds nothing there.
    assert working.open == 1
    working.leave(first.queued)
    assert first.answer() == ""
    assert working.open == 0
    audio_source.released.set()
    assert Asked(working, messages=spoken(recording())).answer()


def test_preparing_counts_towards_the_time_limit(model: Multimodal, monkeypatch: pytest.MonkeyPatch) -> None:
    Hearing(model, monkeypatch)
    made = Scheduler(Engine(model, 1), limit_s=0.3)
    made.start()
    asked = Asked(made, messages=spoken(recording()))
    assert asked.answer() == ""
    assert isinstance(asked.queued.error, RequestTimeoutError)
    made.stop()


def test_recordings_that_are_too_long_all_together_are_refused(model: Multimodal) -> None:
    made = Scheduler(Engine(model, 1), audio_s=1.5)
    made.start()
    assert Asked(made, messages=spoken(recording())).answer()
    for number in (2, 3):
        asked = Asked(made, messages=spoken(*[recording()] * number))
        assert asked.answer() == ""
        assert isinstance(asked.queued.error, AudioError)
    made.stop()


def test_what_was_sent_is_kept_no_longer_than_its_request(model: Multimodal, working: Scheduler) -> None:
    content = picture("green")
    asked = Asked(working, messages=[{"role": "user", "content": [{"type": "image", "image": content}]}])
    asked.answer()
    image = weakref.ref(asked.queued)
    del asked
    gc.collect()
    wait_until(lambda: image() is None)
    holders = [each for each in gc.get_referrers(content) if isinstance(each, ImageRef)]
    assert holders == []


def test_a_client_whose_event_loop_is_closed_ends_nothing_else(model: Multimodal, working: Scheduler) -> None:
    def closed(_: str | None) -> None:
        raise RuntimeError("Event loop is closed")

    working.submit(QueuedRequest(parse_messages(HELLO), SamplingParams(max_tokens=4), closed))
    assert Asked(working).answer() == model.chat(HELLO, max_tokens=4)
    wait_until(lambda: working.open == 0)


def test_health_reports_a_thread_that_has_ended(model: Multimodal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_answer", lambda _: None)
    with served(model, slots=1) as address:
        wait_until(lambda: httpx.get(f"{address}/health").status_code == 503)
        assert httpx.get(f"{address}/health").json()["status"] == "generation ended"
        assert httpx.get(f"{address}/ready").status_code == 503


def test_health_reports_an_engine_that_makes_no_steps(
    model: Multimodal, working: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, entered = threading.Event(), threading.Event()

    def stuck(_: Engine) -> None:
        entered.set()
        held.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stuck)
        Asked(working)
        assert entered.wait(60)
        assert working.problem == ""
        patch.setattr(scheduler, "STALLED_S", 0.0)
        assert "the last step was" in working.problem
        held.set()


def test_a_full_queue_is_not_ready_and_healthy(model: Multimodal, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = StepGate(monkeypatch)
    with served(model, slots=1, waiting=0) as address:
        assert httpx.get(f"{address}/ready").status_code == 200
        body = {"messages": HELLO, "max_tokens": 4}
        asking = threading.Thread(target=httpx.post, args=(f"{address}/v1/chat/completions",), kwargs={"json": body})
        asking.start()
        wait_until(lambda: httpx.get(f"{address}/ready").status_code == 503)
        assert httpx.get(f"{address}/health").status_code == 200
        gate.open()
        asking.join()
        wait_until(lambda: httpx.get(f"{address}/ready").status_code == 200)


def test_stopping_does_not_wait_for_a_thread_that_hangs(model: Multimodal, monkeypatch: pytest.MonkeyPatch) -> None:
    held, entered = threading.Event(), threading.Event()
    monkeypatch.setattr(scheduler, "STOP_S", 0.1)
    made = Scheduler(Engine(model, 1))

    def stuck(_: Engine) -> None:
        entered.set()
        held.wait(60)

    monkeypatch.setattr(Engine, "step", stuck)
    made.start()
    Asked(made)
    assert entered.wait(60)
    made.stop()
    assert made._threads[-1].is_alive()  # It is a daemon.
    held.set()


def test_a_signal_ends_the_process_within_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[tuple[float, Any, bool]] = []

    class Timer:
        daemon = False

        def __init__(self, seconds: float, function: Any, arguments: tuple[int]) -> None:
            self.what = seconds, function

        def start(self) -> None:
            timers.append((*self.what, self.daemon))

    monkeypatch.setattr(serve.threading, "Timer", Timer)
    handled: list[object] = []
    serve.end_after_grace_period(lambda *given: handled.append(given))(signal.SIGTERM, None)
    assert handled == [(signal.SIGTERM, None)]
    assert timers == [(serve.END_S, os._exit, True)]
    assert serve.GRACE_S < serve.END_S < 10


SERVER = """
import sys
from answerers import answerer
from mmphi.serving import serve
from mmphi.generation.engine import Engine
import mmphi, time
Engine.step = lambda self: time.sleep(1000)  # The worst state: a step that never ends.
mmphi.load = lambda *_, **__: answerer()
sys.exit(serve.main(["--model", "a", "--port", sys.argv[1]]))
"""


@pytest.mark.slow
def test_sigterm_ends_a_server_whose_engine_hangs(tmp_path: Path) -> None:
    port = free_port()
    path = os.pathsep.join(str(Path(__file__).parents[n]) for n in (0, 1, 2))
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], env=environment)

    def open_requests() -> int:
        try:
            return int(httpx.get(f"http://127.0.0.1:{port}/health").json()["open"])
        except httpx.HTTPError:
            assert process.poll() is None
            return -1

    wait_until(lambda: open_requests() == 0)
    body = {"messages": HELLO, "stream": True}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError):  # The server is gone.
            httpx.post(url, json=body, timeout=60)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: open_requests() == 1)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    asking.join()
