"""Stress test of ``mmphi serve``: the server must stay up, and every answer must belong to its own request.

Many clients send random valid and malformed requests and disconnect during some of them: texts, images, recordings,
long conversations, empty and too large bodies, damaged files, images one pixel wide, and an hour of silence in 7 kB.
The valid requests are drawn from a small set whose answers were computed before, one at a time; a different answer
counts as wrong. Meanwhile ``/health`` is requested four times per second. At the end, the memory of the server's
processes and the size of the files that it keeps are compared with those after a tenth of the requests.
"""

from __future__ import annotations

import argparse
import base64
import functools
import http.client
import io
import json
import os
import random
import socket
import statistics
import tempfile
import threading
import time
import wave
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import numpy as np
import psutil
from PIL import Image

from mmphi.benchmarks._assistant_sides import mmphi_server, serving
from mmphi.benchmarks._conversations import SHAPES
from mmphi.benchmarks._load import PATH, Body

TIMEOUT_S, LOOK_S, SETTLE_S, RETRY_S = 300.0, 0.25, 5.0, 0.2
HEALTH_S, GROWTH = 0.5, 1.1  # Limits: seconds of a /health response, and growth factor of the server's memory.
LARGEST = 2 * 1024**2  # Largest request that the server accepts, in bytes.
CASES, SECONDS_OF_SOUND = 48, 2
REFUSED = (400, 404, 408, 413, 422)
BUSY = (429, 503)
KINDS = ("answer", "stream", "malformed", "damaged", "extreme", "large", "leave")
ODDS = (40, 20, 12, 10, 6, 4, 8)


def parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    made = argparse.ArgumentParser(
        prog="mmphi benchmark attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="", help="folder or run of a trained model [one with random weights]")
    made.add_argument(
        "--whisper", default="", help="size or file of the Whisper for recordings [no recordings are sent]"
    )
    made.add_argument("--shape", default="tiny", choices=list(SHAPES), help="sizes of random weights [tiny]")
    made.add_argument("--requests", type=int, default=10_000, help="at least so many [10000]")
    made.add_argument("--minutes", type=float, default=0.0, help="at least so long [0]")
    made.add_argument("--clients", type=int, default=30, help="concurrent clients [30]")
    made.add_argument("--seed", type=int, default=0, help="of what is sent [0]")
    made.add_argument("--json", type=Path, help="file for all figures")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run ``mmphi benchmark attack``; returns 1 if the server fails the test."""
    options = parser().parse_args(list(arguments))
    with tempfile.TemporaryDirectory() as name:
        model = options.model
        if not model:
            from mmphi.benchmarks.assistant import _random

            _random(Path(name), options.shape)
            model = str(Path(name) / "mmphi")
        kept = Path(name) / "kept"
        for part in ("tmp", "cache"):
            (kept / part).mkdir(parents=True)
        # The server's temporary files and caches go here, so that their size can be measured.
        with mock.patch.dict(os.environ, TMPDIR=str(kept / "tmp"), XDG_CACHE_HOME=str(kept / "cache")):
            found = attacked(options, model, kept)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["withstood"] else 1


def _wav(samples: bytes, rate: int) -> bytes:
    """A WAV file of 16-bit mono samples."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples)
    return buffer.getvalue()


@functools.cache
def _silence(seconds: int, rate: int) -> bytes:
    return _wav(bytes(2 * seconds * rate), rate)


@dataclass
class Counts:
    """Results that the clients observed.

    Attributes:
        ended: Number of requests by kind and status.
        wrong: Descriptions of answers that differ from the expected one.
        unexpected: Descriptions of unexpected statuses and exceptions.
        health_s: Seconds of every response of ``/health``.
        problems: Descriptions of failed requests of ``/health``.
    """

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def attacked(options: argparse.Namespace, model: str, kept: Path) -> dict[str, Any]:
    """Run the test on a server of a model; returns its results.

    Args:
        options: Parsed options of :func:`parser`.
        model: Folder or run of the model.
        kept: Folder of the server's temporary files and caches.
    """
    start = mmphi_server(model, 8)
    more = ["--max-bytes", str(LARGEST), *(["--whisper", options.whisper] if options.whisper else [])]
    with serving(lambda port: [*start(port), *more]) as (address, pid):
        cases = valid(options.seed, bool(options.whisper))
        expected = {name: _answer(address, body)[1] for name, body in cases.items()}
        counts, done, lock, ended = Counts(), [0], threading.Lock(), threading.Event()
        server, begun = psutil.Process(pid), time.monotonic()
        states: list[dict[str, float]] = []
        watching = threading.Thread(target=_watch, args=(address, counts, ended))
        watching.start()

        def more_to_do() -> bool:
            with lock:
                done[0] += 1
                first = done[0] == max(1, options.requests // 10)
            if first:
                states.append(_state(server, kept))
            return bool(done[0] <= options.requests or time.monotonic() - begun < 60 * options.minutes)

        def client(number: int) -> None:
            draw = random.Random(f"{options.seed}/{number}")
            while more_to_do():
                try:
                    _once(address, draw, cases, expected, counts)
                except Exception as error:
                    counts.unexpected.append(f"{type(error).__name__}: {error}")

        with ThreadPoolExecutor(options.clients) as pool:
            list(pool.map(client, range(options.clients)))
        seconds = time.monotonic() - begun
        time.sleep(SETTLE_S)
        states.append(_state(server, kept))
        again = {name: _answer(address, body)[1] for name, body in cases.items()}
        ended.set()
        watching.join()
    tenth, end, late = states[0], states[-1], max(counts.health_s)
    wrong_after = sum(again[name] != text for name, text in expected.items())
    figures = {
        "requests": done[0] - options.clients,
        "minutes": seconds / 60,
        "ended": dict(sorted(counts.ended.items())),
        "wrong": len(counts.wrong),
        "wrong_after": wrong_after,
        "wrong_examples": counts.wrong[:5],
        "unexpected": counts.unexpected[:20],
        "health_s": {"median": statistics.median(counts.health_s), "worst": late, "asked": len(counts.health_s)},
        "health_problems": counts.problems[:5],
        "after_a_tenth": tenth,
        "at_the_end": end,
    }
    failed = bool(counts.wrong or counts.unexpected or counts.problems or wrong_after)
    grown = end["memory_mb"] > GROWTH * tenth["memory_mb"] or end["disk_mb"] > tenth["disk_mb"] + 1
    return figures | {"withstood": not failed and not grown and late < HEALTH_S}


def _state(server: psutil.Process, kept: Path) -> dict[str, float]:
    processes = [server, *server.children(recursive=True)]
    memory = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            memory += process.memory_info().rss
    size = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
    connections = len(server.net_connections())
    return {"memory_mb": memory / 1e6, "disk_mb": size / 1e6, "threads": server.num_threads(), "sockets": connections}


def _watch(address: str, counts: Counts, ended: threading.Event) -> None:
    """Request ``/health`` every :data:`LOOK_S` seconds until the end."""
    while not ended.wait(LOOK_S):
        begun = time.perf_counter()
        try:
            status, body = _sent(address, "GET", "/health", b"")
            if status != 200:
                counts.problems.append(f"{status}: {body[:200]!r}")
        except OSError as error:
            counts.problems.append(f"{type(error).__name__}: {error}")
        counts.health_s.append(time.perf_counter() - begun)


def valid(seed: int, audio: bool) -> dict[str, Body]:
    """Valid requests, by name.

    Args:
        seed: Seed of the images, sounds and texts.
        audio: Whether some requests have recordings.
    """
    draw, made = random.Random(seed), dict[str, Body]()
    for number in range(CASES):
        parts: list[dict[str, Any]] = [{"type": "text", "text": f"{number}: {_words(draw, draw.randint(1, 30))}?"}]
        messages: list[dict[str, Any]] = []
        if number % 4 == 1:
            parts[:0] = [_image(draw) for _ in range(1 + number % 3)]
        if number % 4 == 2:
            for turn in range(2 + number % 9):
                messages += [{"role": "user", "content": [_image(draw)] if turn == 1 else _words(draw, 9)}]
                messages += [{"role": "assistant", "content": _words(draw, 9)}]
        if number % 4 == 3 and audio:
            parts[:0] = [_sound(draw)]
        messages.append({"role": "user", "content": parts})
        made[f"case {number}"] = {"messages": messages, "max_tokens": draw.choice((4, 8, 16, 32)), "temperature": 0}
    return made


def _words(draw: random.Random, count: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(draw.choices(letters, k=draw.randint(1, 8))) for _ in range(count))


def _image(draw: random.Random) -> dict[str, Any]:
    pixels = np.random.default_rng(draw.getrandbits(32)).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((96, 96)).save(buffer, "PNG")
    return _uri(buffer.getvalue())


def _uri(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:;base64," + base64.b64encode(data).decode()}}


def _sound(draw: random.Random) -> dict[str, Any]:
    samples = np.random.default_rng(draw.getrandbits(32)).normal(0, 3000, 16_000 * SECONDS_OF_SOUND)
    return _recording(_wav(samples.astype(np.int16).tobytes(), 16_000))


def _recording(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def _once(address: str, draw: random.Random, cases: dict[str, Body], expected: dict[str, str], counts: Counts) -> None:
    """Send one request of a random kind and record how it ended."""
    (kind,) = draw.choices(KINDS, ODDS)
    if kind in ("answer", "stream"):
        name = draw.choice(list(cases))
        status, reply = _answer(address, cases[name] | {"stream": kind == "stream"})
        counts.ended[f"{kind} {status}"] += 1
        if status != 200:
            counts.unexpected.append(f"{kind} {status}: {reply[:200]}")
        elif reply != expected[name]:
            of = next((other for other, text in expected.items() if text == reply), "no question")
            counts.wrong.append(f"{name} ({kind}) got the answer of {of}: {reply!r}, not {expected[name]!r}")
        return
    if kind == "leave":
        _leave(address, draw, cases)
        counts.ended["left"] += 1
        return
    status, body = _sent(address, "POST", PATH, BODIES[kind](draw))
    counts.ended[f"{kind} {status}"] += 1
    allowed = (*REFUSED, *BUSY, 200, 504) if kind in ("damaged", "extreme") else (*REFUSED, *BUSY)
    if status not in allowed:
        counts.unexpected.append(f"{kind} {status}: {body[:200]!r}")


def _answer(address: str, body: Body) -> tuple[int, str]:
    """Status and text of an answer; repeats the request while the server is busy."""
    while True:
        status, reply = _sent(address, "POST", PATH, json.dumps(body).encode())
        if status in BUSY:
            time.sleep(RETRY_S)
            continue
        if status != 200:
            return status, reply.decode(errors="replace")
        if not body.get("stream"):
            return status, str(json.loads(reply)["choices"][0]["message"]["content"])
        events = [json.loads(line[6:]) for line in reply.splitlines() if line.startswith(b"data: {")]
        if failed := next((event["error"] for event in events if "error" in event), None):
            return int(failed["code"]), str(failed)
        return status, "".join(event["choices"][0]["delta"].get("content") or "" for event in events)


def _sent(address: str, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=TIMEOUT_S)
    try:
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
        except (BrokenPipeError, ConnectionResetError):
            if len(body) <= LARGEST:
                raise
            return 413, b""  # The server refused the request before all of it was sent.
        try:
            answer = connection.getresponse()
            return answer.status, answer.read()
        except ConnectionResetError:
            if len(body) <= LARGEST:
                raise
            return 413, b""
    finally:
        connection.close()


def _leave(address: str, draw: random.Random, cases: dict[str, Body]) -> None:
    """Send a request or a part of it, and disconnect after a random time."""
    place = urlsplit(address)
    body = json.dumps(draw.choice(list(cases.values())) | {"max_tokens": 200, "stream": draw.random() < 0.5}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    data = head + body
    share = draw.choice((0.0, 0.05, 0.5, 1.0, 1.0, 1.0))
    with socket.create_connection((place.hostname or "", place.port or 80), timeout=TIMEOUT_S) as connection:
        connection.sendall(data[: round(len(data) * share)])
        time.sleep(draw.choice((0.0, 0.01, 0.1, 0.5)))


def _malformed(draw: random.Random) -> bytes:
    """A body that is not a request, or a request with an invalid value."""
    hello = {"messages": [{"role": "user", "content": "hello"}]}
    good = json.dumps(hello).encode()
    wrong: list[Any] = [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"[" * 5000,
        good[: draw.randrange(1, len(good) - 1)],
        {},
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:;base64,***"}}]}]},
        hello | {"model": "another"},
        hello | {"temperature": -1},
        hello | {"temperature": "warm"},
        hello | {"top_p": 0},
        hello | {"max_tokens": 0},
        hello | {"max_tokens": 1.5},
        hello | {"seed": 2**80},
        hello | {"stop": ["a"] * 1000},
        hello | {"n": 5},
        hello | {"stream": "perhaps"},
    ]
    chosen = draw.choice(wrong)
    return chosen if isinstance(chosen, bytes) else json.dumps(chosen).encode()


def _damaged(draw: random.Random) -> bytes:
    """A request with an image or a recording that has changed bytes and may be truncated."""
    make: Callable[[random.Random], dict[str, Any]] = draw.choice((_image, _sound))
    part = make(draw)
    own: dict[str, Any] = part.get("image_url") or part["input_audio"]
    name = "url" if "url" in own else "data"
    before, _, coded = own[name].rpartition(",")
    data = bytearray(base64.b64decode(coded))
    for _ in range(draw.choice((1, 8, 64))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    if draw.random() < 0.3:
        del data[draw.randrange(len(data)) :]
    own[name] = f"{before}," * bool(before) + base64.b64encode(bytes(data)).decode()
    return json.dumps({"messages": [{"role": "user", "content": [part]}], "max_tokens": 4}).encode()


def _line(width: int, height: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return _uri(buffer.getvalue())


def _extreme(draw: random.Random) -> bytes:
    """A request that is small to send and may be expensive to process."""
    turns = [{"role": role, "content": "a b"} for _ in range(2000) for role in ("user", "assistant")]
    hour = _recording(_silence(3600, 1))
    question: Any = draw.choice(
        [
            [_line(1, 60_000)],
            [_line(4000, 1)] * 16,
            [_line(9000, 9000)],
            [hour] * 16,
            [_recording(_silence(60, 8000))],
            _words(draw, 20_000),
            "<image>" * 5000,
            [{"type": "text", "text": "x"}] * 5000,
        ]
    )
    body: Body = {"messages": [*turns[: draw.choice((0, 0, 4000))], {"role": "user", "content": question}]}
    body |= {"max_tokens": draw.choice((1, 64)), "temperature": draw.choice((0, 3e-38, 100)), "stop": list("abcd")}
    return json.dumps(body).encode()


def _large(draw: random.Random) -> bytes:
    """A body that is larger than the server accepts."""
    return b'{"messages": [{"role": "user", "content": "' + b"x" * (LARGEST + draw.choice((0, LARGEST))) + b'"}]}'


BODIES: dict[str, Callable[[random.Random], bytes]] = {
    "malformed": _malformed,
    "damaged": _damaged,
    "extreme": _extreme,
    "large": _large,
}
