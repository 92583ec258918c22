"""Images that are fetched by their URL, while a request is read."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from answerers import answerer, picture, served, wait_until

from mmphi.generation.messages import MessageError
from mmphi.serving.api import ServerConfig, names_url
from mmphi.serving.image_fetch import image_fetcher

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def shown(count: int, url: str = "http://pictures.example/a.png") -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}] * count
    return {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}],
        "max_tokens": 2,
    }


class Slow:
    """Fetches nothing until it may."""

    def __init__(self) -> None:
        self.begun, self.may = 0, threading.Event()
        self._lock = threading.Lock()

    def __call__(self, url: str) -> bytes:
        with self._lock:
            self.begun += 1
        assert self.may.wait(120)
        return picture()


@pytest.fixture
def slow() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.may.set()


def test_no_more_images_are_fetched_than_are_taken(slow: Slow) -> None:
    slow.may.set()
    with served(answerer(), ServerConfig("tiny", fetch=slow), slots=1) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json=shown(5000), timeout=60)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
        assert slow.begun == 16
        assert httpx.post(f"{address}/v1/chat/completions", json=shown(2), timeout=60).status_code == 200


def test_who_leaves_while_images_are_fetched_costs_nothing_more_and_texts_do_not_wait(slow: Slow) -> None:
    with served(answerer(), ServerConfig("tiny", fetch=slow), slots=2, waiting=30) as address:
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{address}/v1/chat/completions", json=shown(10), timeout=2)
        assert slow.begun == 1
        assert httpx.post(f"{address}/v1/chat/completions", json=HELLO, timeout=60).status_code == 200
        assert httpx.get(f"{address}/health").json()["open"] == 1  # It is read still.
        slow.may.set()
        wait_until(lambda: httpx.get(f"{address}/health").json()["open"] == 0)
        assert slow.begun == 1


def test_requests_that_are_read_count_as_waiting(slow: Slow) -> None:
    with served(answerer(), ServerConfig("tiny", fetch=slow), slots=1, waiting=0) as address:
        client = threading.Thread(
            target=httpx.post, args=[f"{address}/v1/chat/completions"], kwargs={"json": shown(1), "timeout": 120}
        )
        client.start()
        wait_until(lambda: slow.begun == 1)
        assert httpx.post(f"{address}/v1/chat/completions", json=HELLO, timeout=60).status_code == 429
        slow.may.set()
        client.join()
        assert httpx.post(f"{address}/v1/chat/completions", json=HELLO, timeout=60).status_code == 200


def test_which_requests_name_a_url() -> None:
    assert names_url(shown(1)["messages"])
    assert not names_url(shown(1, "data:image/png;base64,AAAA")["messages"])
    assert not names_url([*HELLO["messages"], None, {"content": [None, {"type": "image_url"}]}])  # type: ignore[misc]


def test_a_name_that_resolves_to_this_machine_after_the_check_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port, resolve, names = server.server_address[1], socket.getaddrinfo, []

        def rebinding(host: str, *arguments: Any, **options: Any) -> Any:
            if host != "pictures.example":
                return resolve(host, *arguments, **options)
            names.append(host)
            return resolve("8.8.8.8" if len(names) == 1 else "127.0.0.1", *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", rebinding)
        with pytest.raises(MessageError, match="an address that is not public"):
            image_fetcher([f"http://pictures.example:{port}/"])(f"http://pictures.example:{port}/a.png")
        assert len(names) == 2
        server.shutdown()
