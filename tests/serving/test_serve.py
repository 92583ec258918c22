"""The server as OpenAI's own client sees it, and what it does with those who ask too much."""

from __future__ import annotations

import base64
import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from answerers import StepGate, picture, served, wait_until
from builders import tiny_language
from listening import listening

from mmphi.cli import main
from mmphi.errors import SettingsError
from mmphi.generation.messages import MessageError
from mmphi.models.multimodal import Multimodal
from mmphi.serving import serve
from mmphi.serving.api import ServerConfig
from mmphi.serving.image_fetch import image_fetcher


@pytest.fixture(scope="module")
def model() -> Multimodal:
    return listening()


@pytest.fixture(scope="module")
def address(model: Multimodal) -> Iterator[str]:
    with served(model, slots=4) as found:
        yield found


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def asked(question: str, colour: str = "") -> list[dict[str, Any]]:
    uri = "data:image/png;base64," + base64.b64encode(picture(colour or "red")).decode()
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": uri}}] if colour else []
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def test_answers_are_those_of_python(model: Multimodal, client: openai.OpenAI) -> None:
    for colour in ("", "red", "blue"):
        messages = asked("what is it?", colour)
        found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9)
        assert found.choices[0].message.content == model.chat(messages, max_tokens=9)
        assert found.choices[0].finish_reason in ("stop", "length")
        assert found.usage is not None
        assert 1 <= found.usage.completion_tokens <= 9
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert [each.id for each in client.models.list()] == ["tiny"]


def test_a_stream_says_the_same_in_pieces(model: Multimodal, client: openai.OpenAI) -> None:
    messages = asked("what is it?", "red")
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == model.chat(messages, max_tokens=9)
    assert len([piece for piece in said if piece]) > 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert chunks[-1].usage.completion_tokens >= 1


def test_sampling_is_as_it_is_asked_for(model: Multimodal, client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 5, "max_tokens": 12}
    found = client.chat.completions.create(model="tiny", messages=asked("what?"), **how)
    assert found.choices[0].message.content == model.chat(asked("what?"), **how)
    whole = model.chat(asked("what?"), max_tokens=12)
    stop = whole[len(whole) // 2]
    cut = client.chat.completions.create(model="tiny", messages=asked("what?"), max_tokens=12, stop=stop)
    assert cut.choices[0].message.content == whole[: whole.index(stop)].strip()


def test_many_at_once_get_each_their_own_answer(model: Multimodal, client: openai.OpenAI) -> None:
    cases = [asked(f"question {number % 7}?", ("red", "blue", "")[number % 3]) for number in range(60)]
    expected = {json.dumps(messages): model.chat(messages, max_tokens=8) for messages in cases}

    def ask(messages: list[dict[str, Any]]) -> str | None:
        found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
        return found.choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, cases))
    assert answers == [expected[json.dumps(messages)] for messages in cases]
    assert len(set(answers)) > 3


def test_what_was_read_is_remembered_and_said(client: openai.OpenAI) -> None:
    messages = asked("what is this that I have never asked about?", "green")
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens - 1
    assert second.choices[0].message.content == first.choices[0].message.content


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ({"messages": []}, 400, "no message"),
        ({}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "robot"),
        ({"messages": asked("x"), "model": "gpt-4"}, 404, "gpt-4"),
        ({"messages": asked("x"), "temperature": -1}, 400, "temperature"),
        ({"messages": asked("x"), "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": asked("x"), "n": 2}, 400, "n"),
        ({"messages": asked("x" * 600)}, 400, "room"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]},
            400,
            "local file paths",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a"}}]}
                ]
            },
            400,
            "not fetched",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
                ]
            },
            400,
            "not fetched",
        ),
        ({"messages": asked("x" * 10_000_000)}, 400, "characters"),
        (
            {"messages": [{"role": "user", "content": asked("x", "red")[0]["content"] * 1000}]},
            400,
            "more than 16 images",
        ),
        ({"messages": [*asked("x"), {"role": "assistant", "content": "y"}]}, 400, "the last message is an answer"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
                    }
                ]
            },
            400,
            "image",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "!"}}]}]},
            400,
            "base64",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_in_openais_way(
    address: str, body: dict[str, Any], status: int, why: str, stream: bool
) -> None:
    answer = httpx.post(f"{address}/v1/chat/completions", json={**body, "stream": stream}, timeout=30)
    assert answer.status_code == status
    assert why in answer.json()["error"]["message"]


def test_a_request_that_is_too_large_or_no_json_is_refused(model: Multimodal, address: str) -> None:
    assert httpx.post(f"{address}/v1/chat/completions", content=b"{", timeout=30).status_code == 400
    with served(model, ServerConfig("tiny", largest=1000), slots=1) as small:
        assert httpx.post(f"{small}/v1/chat/completions", json={"messages": asked("x" * 2000)}).status_code == 413

        def parts() -> Iterator[bytes]:
            for _ in range(10):
                yield b"x" * 500

        assert httpx.post(f"{small}/v1/chat/completions", content=parts()).status_code == 413


def test_a_key_is_asked_for(model: Multimodal) -> None:
    with served(model, ServerConfig("tiny", key="secret"), slots=1) as address:
        for key in ("wrong", "secre"):
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0).chat.completions.create(
                    model="tiny", messages=asked("x")
                )
        assert list(openai.OpenAI(base_url=f"{address}/v1", api_key="secret").models.list())
        assert httpx.get(f"{address}/health").status_code == 200


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> StepGate:
    return StepGate(monkeypatch)


def open_requests(address: str) -> int:
    return int(httpx.get(f"{address}/health").json()["open"])


def test_requests_over_the_queue_limit_get_429_and_retry_after(model: Multimodal, gate: StepGate) -> None:
    """One is answered and one waits: of six requests four are refused, while the two are still open."""
    with served(model, slots=1, waiting=1) as address, ThreadPoolExecutor(6) as pool:
        body = {"messages": asked("x"), "max_tokens": 20}
        url = f"{address}/v1/chat/completions"
        requests = [pool.submit(httpx.post, url, json=body, timeout=120) for _ in range(6)]
        refused = [request.result() for request in islice(as_completed(requests), 4)]
        gate.open()
        answers = [request.result() for request in requests]
    assert [answer.status_code for answer in refused] == [429] * 4
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    good = [answer.json()["choices"][0]["message"]["content"] for answer in answers if answer.status_code == 200]
    assert good == [model.chat(asked("x"), max_tokens=20)] * 2


def test_generation_stops_when_the_client_disconnects(model: Multimodal, gate: StepGate) -> None:
    """In the middle of a stream, in that of a plain request, and before the first token of a stream."""
    with served(model, slots=1) as address:
        body = {"messages": asked("x"), "max_tokens": 200, "stream": True}
        gate.permit(2)
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
        wait_until(lambda: open_requests(address) == 0)
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        plain = json.dumps({**body, "stream": False})
        connection.request("POST", "/v1/chat/completions", plain, {"Content-Type": "application/json"})
        gate.permit(2)
        wait_until(lambda: "mmphi_first_token_seconds_count 1.0" in httpx.get(f"{address}/metrics").text)
        wait_until(lambda: open_requests(address) == 1)
        connection.close()
        wait_until(lambda: open_requests(address) == 0)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        wait_until(lambda: open_requests(address) == 1)
        connection.close()
        wait_until(lambda: open_requests(address) == 0)
        counted = httpx.get(f"{address}/metrics").text
        assert 'mmphi_requests_total{ended="cancelled"} 3.0' in counted


def test_an_answer_over_the_time_limit_ends_with_504(model: Multimodal, gate: StepGate) -> None:
    """Before its first token, and in its middle."""
    for steps in (0, 3):
        if steps:
            gate.permit(steps)
        with served(model, slots=1, limit_s=2.0) as address:
            body = {"messages": asked("x"), "max_tokens": 200}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
            assert answer.status_code == 504
            metrics = httpx.get(f"{address}/metrics").text
            assert 'mmphi_requests_total{ended="too slow"} 1.0' in metrics
            assert ("mmphi_first_token_seconds_count 1.0" in metrics) == (steps > 0)


def test_a_model_that_does_not_see_says_so() -> None:
    with served(Multimodal(tiny_language(), None, None), slots=1) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": asked("x", "red")})
        assert answer.status_code == 400
        assert "accepts no images" in answer.json()["error"]["message"]


def test_urls_are_fetched_only_where_they_may_be(
    model: Multimodal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import functools
    import http.server

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture("blue"))
    (tmp_path / "secret.png").write_bytes(picture("blue"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        there = f"http://127.0.0.1:{files.server_port}"
        fetch = image_fetcher([f"{there}/images/"])
        assert fetch(f"{there}/images/a.png") == picture("blue")
        refused = ["secret.png", "images/../secret.png", "images/%2e%2e/secret.png", "images/%252e%252e/secret.png"]
        refused += ["images/..%2fsecret.png", "images/..\\secret.png", "images/none.png", "images/a b.png", "images/%"]
        for url in [f"{there}/{path}" for path in refused] + [there.replace("//", "//x@") + "/images/a.png"]:
            with pytest.raises(MessageError):
                fetch(url)
        files.shutdown()
    names = {"inside.example": "127.0.0.1", "intranet.example": "10.1.2.3", "six.example": "fe80::1%eth0"}
    monkeypatch.setattr("socket.getaddrinfo", lambda host, _: [(2, 1, 6, "", (names[host], 0))])
    for name in names:
        with pytest.raises(MessageError, match="not public"):
            image_fetcher([f"http://{name}/"])(f"http://{name}/a.png")
    for prefix in ("https://example.org", "file:///", "/images/"):
        with pytest.raises(SettingsError):
            image_fetcher([prefix])


def test_others_may_ask_only_with_a_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(serve.KEY, raising=False)
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert serve.KEY in capsys.readouterr().err
