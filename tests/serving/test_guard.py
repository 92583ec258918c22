"""What is refused before it is read, and clients that send nothing."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from answerers import answerer, served

from mmphi.serving import guard
from mmphi.serving.api import ServerConfig
from mmphi.serving.openai_request import MAX_STOPS, ChatRequest

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
LARGEST = 100_000


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    patch = pytest.MonkeyPatch()
    patch.setattr(guard.Guard.__init__, "__defaults__", (0.5, ()))
    patch.setattr(guard.TimedProtocol, "headers_s", 0.5)
    patch.setattr(guard.TimedProtocol, "write_s", 0.5)
    with served(answerer(), ServerConfig("tiny", key="secret", largest=LARGEST), slots=1) as found:
        yield found
    patch.undo()


def sent(address: str, data: bytes) -> bytes:
    """All that the server says to some bytes until it closes the connection."""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        connection.sendall(data)
        said = b""
        while more := connection.recv(65536):
            said += more
    return said


def send_for_ever(connection: socket.socket, data: bytes) -> None:
    while True:
        connection.sendall(data)


def head(length: int, *more: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Content-Length: {length}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


KEY = "Authorization: Bearer secret"


def test_without_the_key_nothing_of_the_body_is_waited_for(address: str) -> None:
    said = sent(address, head(LARGEST))  # Of which nothing ever comes.
    assert said.startswith(b"HTTP/1.1 401")
    assert b"the key is missing or wrong" in said
    assert httpx.get(f"{address}/v1/models").status_code == 401
    assert httpx.get(f"{address}/health").status_code == 200


@pytest.mark.parametrize("host", ["[", "a]", "[x]", "evil.example", ""])
def test_a_host_that_is_malformed_or_another_is_refused(host: str) -> None:
    with served(answerer(), ServerConfig("tiny", hosts=("127.0.0.1",)), slots=1) as address:
        said = sent(address, f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert said.startswith(b"HTTP/1.1 403")
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["type"] == "permission_error"


def test_a_body_too_large_is_refused_by_its_length_and_while_it_comes(address: str) -> None:
    assert sent(address, head(LARGEST + 1, KEY)).startswith(b"HTTP/1.1 413")
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", KEY, "Transfer-Encoding: chunked", "", ""]
    chunk = b"%x\r\n" % (LARGEST // 2) + b"x" * (LARGEST // 2) + b"\r\n"
    assert sent(address, "\r\n".join(lines).encode() + 2 * chunk + b"1\r\nx\r\n").startswith(b"HTTP/1.1 413")


def test_a_request_that_does_not_come_ends_its_connection(address: str) -> None:
    assert sent(address, b"") == b""
    assert sent(address, b"POST /v1/chat") == b""
    assert sent(address, head(10, KEY) + b"x").startswith(b"HTTP/1.1 408")
    whole = json.dumps(HELLO).encode()
    twice = sent(address, head(len(whole), KEY) + whole + b"POST /v1/ch")
    assert twice.startswith(b"HTTP/1.1 200")  # And the second one is waited for no longer.


def test_an_answer_that_is_not_read_ends_its_connection(address: str) -> None:
    parts = urlsplit(address)
    asked = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect((parts.hostname, parts.port))
        with pytest.raises(OSError, match=r"reset|pipe"):  # And not the time limit of 60 s.
            send_for_ever(connection, asked * 100)


def test_few_texts_to_stop_at_are_taken(address: str) -> None:
    headers = {"Authorization": "Bearer secret"}
    url = f"{address}/v1/chat/completions"
    for stop in (["x"] * (MAX_STOPS + 1), "x" * 1000):
        answer = httpx.post(url, json={**HELLO, "stop": stop}, headers=headers)
        assert answer.status_code == 400
        assert "at most 4 stop texts" in answer.json()["error"]["message"]
    assert ChatRequest(**HELLO, stop=["a", "b"]).sampling(0).stop == ("a", "b")


def test_what_is_malformed_is_the_clients_error(address: str) -> None:
    headers, url = {"Authorization": "Bearer secret"}, f"{address}/v1/chat/completions"
    for body in (b"{", b"[]", b"\xff", b"", json.dumps({**HELLO, "seed": 2**70}).encode()):
        answer = httpx.post(url, content=body, headers=headers)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["type"] == "invalid_request_error"
