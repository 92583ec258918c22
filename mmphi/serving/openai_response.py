"""Responses in the format of OpenAI's API, whole and as a stream."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from mmphi.serving.http_errors import error_body, error_response
from mmphi.serving.scheduler import QueuedRequest, Scheduler

Event = dict[str, Any]


class Reply:
    """The response to one request.

    Args:
        queued: The request.
        pieces: Pieces of the answer, ``None`` at its end.
        model: Name of the model.
    """

    def __init__(self, queued: QueuedRequest, pieces: asyncio.Queue[str | None], model: str) -> None:
        self.queued, self.pieces = queued, pieces
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def first(self) -> str | None:
        """The first piece of the answer; ``None`` if the answer is empty.

        Raises:
            APIError: If the request fails before its first piece.
        """
        piece = await self.pieces.get()
        if piece is None and self.queued.error is not None:
            raise error_response(self.queued.error)
        return piece

    async def whole(self) -> Event:
        """The complete response, at the end of the answer.

        Raises:
            APIError: If the request fails.
        """
        parts = []
        while (piece := await self.pieces.get()) is not None:
            parts.append(piece)
        if self.queued.error is not None:
            raise error_response(self.queued.error)
        message = {"role": "assistant", "content": "".join(parts)}
        choice = {"index": 0, "message": message, "finish_reason": self._reason(), "logprobs": None}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self._usage()}

    async def events(self, worker: Scheduler, piece: str | None, usage: bool) -> AsyncIterator[str]:
        """Yield the response as server-sent events.

        Args:
            worker: Scheduler that cancels the request when the stream is closed.
            piece: The first piece of the answer, as of :meth:`first`.
            usage: Whether the numbers of tokens are sent at the end.
        """
        try:
            yield self._event({"role": "assistant", "content": ""})
            while piece is not None:
                yield self._event({"content": piece})
                piece = await self.pieces.get()
            if self.queued.error is not None:
                yield f"data: {json.dumps(error_body(error_response(self.queued.error)))}\n\n"
                return
            yield self._event({}, self._reason())
            if usage:
                yield _line({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        finally:  # Also when the client has disconnected.
            worker.leave(self.queued)

    def _event(self, delta: Event, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _line({**self.head, "object": "chat.completion.chunk", "choices": [choice]})

    def _reason(self) -> str:
        return self.queued.reason or "stop"

    def _usage(self) -> Event:
        prompt, completion = self.queued.prompt_tokens, self.queued.tokens
        details = {"cached_tokens": self.queued.reused}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": details,
        }


def _line(event: Event) -> str:
    # In ASCII, because clients also split a stream into lines at characters such as U+2028.
    return f"data: {json.dumps(event)}\n\n"
