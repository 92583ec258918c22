"""HTTP interface of OpenAI's chat completions, on FastAPI."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mmphi.errors import MmphiError
from mmphi.generation.messages import Conversation, parse_messages
from mmphi.serving.guard import Guard
from mmphi.serving.http_errors import APIError, error_answer, error_response
from mmphi.serving.metrics import Metrics
from mmphi.serving.openai_request import ChatRequest, parse_request
from mmphi.serving.openai_response import Reply
from mmphi.serving.scheduler import ClientDisconnectedError, QueuedRequest, RequestTimeoutError, Scheduler

LOOK_S = 0.2  # Seconds between checks whether the client is still connected.
READERS = 16  # Threads that parse requests, and as many that fetch images.


@dataclass(frozen=True)
class ServerConfig:
    """Settings of a server.

    Attributes:
        name: Name of the model in requests and responses.
        key: API key that requests under ``/v1/`` must carry; empty for none.
        largest: Largest request body, in bytes.
        temperature: Sampling temperature of requests without one.
        fetch: Fetches an image by its URL, or raises an error; no URL is fetched if ``None``.
        hosts: ``Host`` names that are accepted if there is no key; empty for any.
        origins: Origins of web pages that may send requests (CORS): ``https://example.org``; ``*`` for any.
    """

    name: str
    key: str = ""
    largest: int = 64 * 1024**2
    temperature: float = 0.0
    fetch: Callable[[str], bytes] | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


def application(worker: Scheduler, rules: ServerConfig, metrics: Metrics) -> FastAPI:
    """Build the server's application.

    Args:
        worker: Scheduler of the requests; it is started and stopped with the application.
        rules: Settings of the server.
        metrics: Prometheus metrics that count the requests.
    """

    @contextlib.asynccontextmanager
    async def living(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)
        for pool in (readers, fetchers):
            pool.shutdown(wait=False, cancel_futures=True)

    readers, fetchers = ThreadPoolExecutor(READERS, "reading"), ThreadPoolExecutor(READERS, "fetching")
    app = FastAPI(title="mmphi", docs_url=None, redoc_url=None, openapi_url=None, lifespan=living)
    app.add_middleware(Guard, key=rules.key, largest=rules.largest, hosts=rules.hosts)
    if rules.origins:  # Outside the guard: the preflight request of a browser carries no key.
        app.add_middleware(CORSMiddleware, allow_origins=list(rules.origins), allow_methods=["*"], allow_headers=["*"])

    @app.exception_handler(HTTPException)  # Includes the framework's own 404 and 405.
    async def refuse(_: Request, error: HTTPException) -> JSONResponse:
        return error_answer(error if isinstance(error, APIError) else APIError(error.status_code, str(error.detail)))

    def state(problem: str) -> JSONResponse:
        content = {"status": problem or "ok", "model": rules.name, "open": worker.open}
        return JSONResponse(content, 503 if problem else 200)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Liveness: 503 if only a restart helps."""
        return state(worker.problem)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Readiness: 503 also while the queue is full."""
        return state(worker.problem or ("the queue is full" if worker.full else ""))

    @app.get("/metrics")
    async def measured() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type=metrics.media_type)

    model = {"id": rules.name, "object": "model", "created": int(time.time()), "owned_by": "mmphi"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def named(name: str) -> dict[str, Any]:
        if name != rules.name:
            raise _no_model(name, rules)
        return model

    @app.post("/v1/chat/completions", response_model=None)
    async def completions(request: Request) -> Response:
        born = time.monotonic()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            worker.check_room()  # Before the body is read and parsed.
            # Not `request.body()`: the request would keep the body until it is answered.
            parsed = await loop.run_in_executor(
                readers, _read, b"".join([part async for part in request.stream()]), rules
            )
            left = threading.Event()
            leaving = asyncio.create_task(_leaving(request, left))
            try:
                with worker.reading():
                    pool = fetchers if rules.fetch is not None and names_url(parsed.messages) else readers
                    check = partial(_check, left, born, worker.limit_s)
                    conversation = await loop.run_in_executor(pool, _conversation, parsed, rules, check)
            finally:
                leaving.cancel()
            if left.is_set() or await request.is_disconnected():
                return Response(status_code=499)
            queued = QueuedRequest(conversation, parsed.sampling(rules.temperature), tell, born)
            worker.submit(queued)
        except (ClientDisconnect, ClientDisconnectedError):
            return Response(status_code=499)  # The status that nginx logs; it reaches no client.
        except MmphiError as error:
            metrics.refused(error)
            raise error_response(error) from error
        answer = Reply(queued, pieces, rules.name)
        watching = asyncio.create_task(_watch(request, worker, queued))
        try:
            if not parsed.stream:
                return JSONResponse(await answer.whole())
            first = await answer.first()  # So that a request that fails early gets an error instead of a stream.
        except BaseException:
            worker.leave(queued)
            raise
        finally:
            watching.cancel()
        usage = parsed.stream_options is not None and bool(parsed.stream_options.include_usage)
        return StreamingResponse(answer.events(worker, first, usage), media_type="text/event-stream")

    return app


def _read(body: bytes, rules: ServerConfig) -> ChatRequest:
    """Parse a request body.

    Raises:
        APIError: If it is malformed, or names another model.
    """
    parsed = parse_request(body)
    if parsed.model not in (None, "", rules.name):
        raise _no_model(str(parsed.model), rules)
    return parsed


def _conversation(parsed: ChatRequest, rules: ServerConfig, check: Callable[[], None]) -> Conversation:
    """Conversation of a request, with its images fetched if that is allowed.

    Args:
        parsed: The request.
        rules: Settings of the server.
        check: Called before each image is fetched; its exceptions are passed on.

    Raises:
        MessageError: If a message is invalid.
    """

    def fetched(url: str) -> bytes:
        assert rules.fetch is not None
        check()
        return rules.fetch(url)

    return parse_messages(parsed.messages, files=False, allow=fetched if rules.fetch is not None else None)


def _check(left: threading.Event, born: float, limit_s: float) -> None:
    """Raise if a request should not be processed further.

    Raises:
        ClientDisconnectedError: If its client has disconnected.
        RequestTimeoutError: If its time limit is exceeded.
    """
    if left.is_set():
        raise ClientDisconnectedError("the client is gone")
    if limit_s and time.monotonic() - born > limit_s:
        raise RequestTimeoutError(
            f"the answer took more than {limit_s:g} s", "send the images themselves, as data: URIs"
        )


def names_url(messages: list[Any]) -> bool:
    """Whether a message refers to an image by a URL that has to be fetched."""
    parts = [
        part
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, dict)
    ]
    urls = [part.get("image_url") for part in parts if part.get("type") in ("image", "image_url")]
    names = [url.get("url") if isinstance(url, dict) else url for url in urls]
    return any(isinstance(name, str) and name[:5].lower() != "data:" for name in names)


async def _leaving(request: Request, left: threading.Event) -> None:
    """Set the event when the client disconnects before its request is queued."""
    while not await request.is_disconnected():
        await asyncio.sleep(LOOK_S)
    left.set()


def _no_model(name: str, rules: ServerConfig) -> APIError:
    return APIError(404, f"there is no model {name[:100]!r} here; there is {rules.name!r}", "not_found_error", "model")


async def _watch(request: Request, worker: Scheduler, queued: QueuedRequest) -> None:
    """Cancel a queued request when its client disconnects."""
    while not await request.is_disconnected():
        await asyncio.sleep(LOOK_S)
    worker.leave(queued)
