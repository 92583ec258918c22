"""The same HTTP interface as OpenAI's chat completions, on FastAPI."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mmphi.assistant.guard import Guard
from mmphi.assistant.metrics import Metrics
from mmphi.assistant.refusals import Refused, refusal, told
from mmphi.assistant.reply import Reply
from mmphi.assistant.worker import Ticket, Worker
from mmphi.errors import MmphiError
from mmphi.models.chat.messages import Conversation, conversation
from mmphi.models.chat.sampling import Sampling

LOOK_S = 0.2  # How often it is looked whether the one who asked is still there.
MAX_TOKENS = 256
MAX_STOPS, MAX_STOP_LETTERS = 4, 256  # As many as OpenAI takes; each is looked for at every token.
READERS = 16  # Threads in which requests are parsed, and images fetched.


class StreamOptions(BaseModel):
    """What else a stream tells."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """What ``/v1/chat/completions`` is asked; names are OpenAI's."""

    model_config = ConfigDict(extra="ignore")

    messages: list[Any]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Literal[1] = 1

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > MAX_STOPS or any(len(text) > MAX_STOP_LETTERS for text in texts):
            raise ValueError(f"at most {MAX_STOPS} texts of at most {MAX_STOP_LETTERS} letters are taken")
        return stop

    def sampling(self, temperature: float) -> Sampling:
        """How the answer is chosen.

        Args:
            temperature: Where the request says none.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            self.max_completion_tokens or self.max_tokens or MAX_TOKENS,
            temperature if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            self.seed,
            tuple(stop),
        )


@dataclass(frozen=True)
class Rules:
    """What a server allows.

    Attributes:
        name: Of the model.
        key: That every request must bring; none where empty.
        largest: Bytes of a request.
        temperature: Where a request says none.
        fetch: Gets an image by its URL, or refuses; no URL is fetched without it.
    """

    name: str
    key: str = ""
    largest: int = 64 * 1024**2
    temperature: float = 0.0
    fetch: Callable[[str], bytes] | None = None


def application(worker: Worker, rules: Rules, metrics: Metrics) -> FastAPI:
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
        readers.shutdown(wait=False, cancel_futures=True)

    readers = ThreadPoolExecutor(READERS, "reading")
    app = FastAPI(title="mmphi", docs_url=None, redoc_url=None, openapi_url=None, lifespan=living)
    app.add_middleware(Guard, key=rules.key, largest=rules.largest)

    @app.exception_handler(Refused)
    async def refuse(_: Request, error: Refused) -> JSONResponse:
        return told(error)

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

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": rules.name, "object": "model", "created": 0, "owned_by": "mmphi"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def completions(request: Request) -> Response:
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        body = await request.body()

        def tell(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            asked, said = await loop.run_in_executor(readers, _read, body, rules)
            del body
            ticket = Ticket(said, asked.sampling(rules.temperature), tell)
            worker.submit(ticket)
        except MmphiError as error:
            metrics.refused(error)
            raise refusal(error) from error
        answer = Reply(ticket, pieces, rules.name)
        watching = asyncio.create_task(_watch(request, worker, ticket))
        try:
            if not asked.stream:
                return JSONResponse(await answer.whole())
            first = await answer.first()  # What is wrong with the question is an error, and no stream.
        except BaseException:
            worker.leave(ticket)
            raise
        finally:
            watching.cancel()
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(answer.events(worker, first, usage), media_type="text/event-stream")

    return app


def _read(body: bytes, rules: Rules) -> tuple[ChatRequest, Conversation]:
    """What a request asks.

    Raises:
        Refused: If it is malformed, or asks another model.
        MessageError: If a message cannot be read.
    """
    try:
        asked = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the request"
        raise Refused(400, f"{where}: {first['msg']}") from error
    if asked.model not in ("", rules.name):
        raise Refused(404, f"there is no model {asked.model!r} here; there is {rules.name!r}", "not_found_error")
    return asked, conversation(asked.messages, files=False, allow=rules.fetch)


async def _watch(request: Request, worker: Worker, ticket: Ticket) -> None:
    """Let go of a question when the one who asked has left."""
    while not await request.is_disconnected():
        await asyncio.sleep(LOOK_S)
    worker.leave(ticket)
