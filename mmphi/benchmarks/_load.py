"""Load generator: concurrent clients of a server, and the latencies that they measure."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

Body = dict[str, Any]
PATH = "/v1/chat/completions"
TIMEOUT_S = 300.0
LATE = 0.95


@dataclass(frozen=True)
class Seen:
    """One answer as measured by its client.

    Attributes:
        text: Text of the answer.
        tokens: Number of its tokens.
        first_s: Seconds until the first piece of text, waits after a 429 included.
        seconds: Seconds until the end, waits after a 429 included.
        refusals: Number of 429 responses before the request was accepted.
    """

    text: str
    tokens: int
    first_s: float
    seconds: float
    refusals: int = 0


def ask(address: str, body: Body) -> Seen:
    """Send one streaming request; repeat it as long as the queue is full.

    Args:
        address: Address of the server: ``http://127.0.0.1:8000``.
        body: Body of the request.

    Raises:
        RuntimeError: If the status is neither 200 nor 429, or the stream contains an error.
    """
    refusals = 0
    begun = time.perf_counter()
    while True:
        place = urlsplit(address)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=TIMEOUT_S)
        try:
            request = body | {"stream": True, "stream_options": {"include_usage": True}}
            connection.request("POST", PATH, json.dumps(request), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status == 429:
                refusals += 1
                time.sleep(float(answer.headers.get("Retry-After") or 1))
                continue
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {answer.read()[:500].decode(errors='replace')}")
            return _seen(answer, begun, refusals)
        finally:
            connection.close()


def _seen(lines: Any, begun: float, refusals: int) -> Seen:
    pieces: list[str] = []
    first, tokens = 0.0, 0
    for line in lines:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            raise RuntimeError(str(event["error"]))
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event["choices"]:
            if piece := choice["delta"].get("content"):
                first = first or time.perf_counter() - begun
                pieces.append(piece)
    return Seen("".join(pieces).strip(), tokens, first, time.perf_counter() - begun, refusals)


def load(
    address: str, bodies: Sequence[Body], users: int, look: Callable[[int], None] = lambda _: None
) -> tuple[list[Seen], float]:
    """Send requests from concurrent users, each of which sends the next one after its last answer.

    Args:
        address: Address of the server.
        bodies: Bodies of the requests.
        users: Number of concurrent users.
        look: Called with the index of every request before it is sent.

    Returns:
        Measurements of each answer, in order, and the total time in seconds.
    """
    lock, left = threading.Lock(), iter(enumerate(bodies))
    found: dict[int, Seen] = {}

    def taken() -> Iterator[tuple[int, Body]]:
        while True:
            with lock:
                task = next(left, None)
            if task is None:
                return
            yield task

    def user(_: int) -> None:
        for number, body in taken():
            look(number)
            found[number] = ask(address, body)

    begun = time.perf_counter()
    with ThreadPoolExecutor(users) as pool:
        list(pool.map(user, range(users)))
    return [found[number] for number in range(len(bodies))], time.perf_counter() - begun


def summary(seen: Sequence[Seen], seconds: float) -> dict[str, float]:
    """Throughput, median latencies, 95th percentile of the latency, and number of refusals."""
    answers = sorted(each.seconds for each in seen)
    return {
        "requests_per_s": len(seen) / seconds,
        "tokens_per_s": sum(each.tokens for each in seen) / seconds,
        "first_token_s": statistics.median(each.first_s for each in seen),
        "answer_s": statistics.median(answers),
        "late_answer_s": answers[min(len(answers) - 1, int(LATE * len(answers)))],
        "refusals": float(sum(each.refusals for each in seen)),
    }
