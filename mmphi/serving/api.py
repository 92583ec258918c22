"""The same HTTP interface as OpenAI's chat completions, on FastAPI."""

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

LOOK_S = 0.2  # How often it is looked whether the one who asked is still there.
READERS = 16  # Threads in which requests are parsed, and as many in which images are fetched.


@dataclass(frozen=True)
class ServerConfig:
    """What a server allows.

    Attributes:
        name: Of the model.
        key: That every request must bring; none where empty.
        largest: Bytes of a request.
        temperature: Where a request says none.
        fetch: Gets an image by its URL, or refuses; no URL is fetched without it.
        hosts: Names that a request may give as its ``Host`` where there is no key; any where empty.
        origins: Of pages in a browser that may ask, ``https://example.org``; ``*`` for any.
    """

    name: str
    key: str = ""
    largest: int = 64 * 1024**2
    temperature: float = 0.0
    fetch: Callable[[str], bytes] | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


def application(worker: Scheduler, rules: ServerConfig, metrics: Metrics) -> FastAPI:
    """The server.

    Args:
        worker: Who answers; it is started and stopped with the server.
        rules: What is allowed.
        metrics: What is counted.
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
    if rules.origins:  # Before the key is asked for: a browser sends none with the question whether it may ask.
        app.add_middleware(CORSMiddleware, allow_origins=list(rules.origins), allow_methods=["*"], allow_headers=["*"])

    @app.exception_handler(HTTPException)  # Also those of the framework: no such path, no such method.
    async def refuse(_: Request, error: HTTPException) -> JSONResponse:
        return error_answer(error if isinstance(error, APIError) else APIError(error.status_code, str(error.detail)))

    def state(problem: str) -> JSONResponse:
        content = {"status": problem or "ok", "model": rules.name, "open": worker.open}
        return JSONResponse(content, 503 if problem else 200)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Liveness: 503 where only a restart helps."""
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
            worker.check_room()  # Before a body is read and parsed for nothing.
            # Not `request.body()`, which the request keeps until it is answered.
            asked = await loop.run_in_executor(
                readers, _read, b"".join([part async for part in request.stream()]), rules
            )
            left = threading.Event()
            leaving = asyncio.create_task(_leaving(request, left))
            try:
                with worker.reading():
                    pool = fetchers if rules.fetch is not None and names_url(asked.messages) else readers
                    check = partial(_check, left, born, worker.limit_s)
                    said = await loop.run_in_executor(pool, _conversation, asked, rules, check)
            finally:
                leaving.cancel()
            if left.is_set() or await request.is_disconnected():
                return Response(status_code=499)
            queued = QueuedRequest(said, asked.sampling(rules.temperature), tell, born)
            worker.submit(queued)
        except (ClientDisconnect, ClientDisconnectedError):
            return Response(status_code=499)  # As nginx logs it; nobody gets it.
        except MmphiError as error:
            metrics.refused(error)
            raise error_response(error) from error
        answer = Reply(queued, pieces, rules.name)
        watching = asyncio.create_task(_watch(request, worker, queued))
        try:
            if not asked.stream:
                return JSONResponse(await answer.whole())
            first = await answer.first()  # What is wrong with the question is an error, and no stream.
        except BaseException:
            worker.leave(queued)
            raise
        finally:
            watching.cancel()
        usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        return StreamingResponse(answer.events(worker, first, usage), media_type="text/event-stream")

    return app


def _read(body: bytes, rules: ServerConfig) -> ChatRequest:
    """What a request asks.

    Raises:
        Refused: If it is malformed, or asks another model.
    """
    asked = parse_request(body)
    if asked.model not in (None, "", rules.name):
        raise _no_model(str(asked.model), rules)
    return asked


def _conversation(asked: ChatRequest, rules: ServerConfig, check: Callable[[], None]) -> Conversation:
    """Its conversation, with images fetched where that is allowed.

    Args:
        asked: The request.
        rules: What is allowed.
        check: Called before each image is fetched; what it raises ends this.

    Raises:
        MessageError: If a message cannot be read.
    """

    def fetched(url: str) -> bytes:
        assert rules.fetch is not None
        check()
        return rules.fetch(url)

    return parse_messages(asked.messages, files=False, allow=fetched if rules.fetch is not None else None)


def _check(left: threading.Event, born: float, limit_s: float) -> None:
    """That a request that is read is still wanted, and may still be answered.

    Raises:
        Left: If its client has left.
        TooSlow: If its time is over.
    """
    if left.is_set():
        raise ClientDisconnectedError("the client is gone")
    if limit_s and time.monotonic() - born > limit_s:
        raise RequestTimeoutError(
            f"the answer took more than {limit_s:g} s", "send the images themselves, as data: URIs"
        )


def names_url(messages: list[Any]) -> bool:
    """Whether a message names an image by a URL that has to be fetched."""
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
    """Note when the client of a request that is read has left."""
    while not await request.is_disconnected():
        await asyncio.sleep(LOOK_S)
    left.set()


def _no_model(name: str, rules: ServerConfig) -> APIError:
    return APIError(404, f"there is no model {name[:100]!r} here; there is {rules.name!r}", "not_found_error", "model")


async def _watch(request: Request, worker: Scheduler, queued: QueuedRequest) -> None:
    """Let go of a question when the one who asked has left."""
    while not await request.is_disconnected():
        await asyncio.sleep(LOOK_S)
    worker.leave(queued)
