"""Error responses in OpenAI's format."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from mmphi.errors import GenerationError, MmphiError, PartMissingError
from mmphi.generation.messages import MessageError
from mmphi.serving.scheduler import QueueFullError, RequestTimeoutError, ServerStoppingError

RETRY_AFTER_S = 1


class APIError(HTTPException):  # FastAPI passes on no other exception while it reads a request.
    """An error that is sent as the response to a request.

    Args:
        status: HTTP status.
        message: Description of the error.
        kind: Error type in OpenAI's API.
        param: Name of the invalid parameter; ``None`` if the error is not about one.
    """

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None
    ) -> None:
        super().__init__(status, message)
        self.status, self.message, self.kind, self.param = status, message, kind, param


def error_response(error: Exception) -> APIError:
    """Returns the HTTP error for an exception."""
    if isinstance(error, QueueFullError):
        return APIError(429, str(error), "rate_limit_error")
    if isinstance(error, ServerStoppingError):
        return APIError(503, str(error), "server_error")
    if isinstance(error, RequestTimeoutError):
        return APIError(504, str(error), "timeout_error")
    if isinstance(error, MessageError):
        return APIError(400, str(error), param="messages")
    if isinstance(error, MmphiError) and not isinstance(error, GenerationError | PartMissingError):
        return APIError(400, str(error))
    return APIError(500, f"{type(error).__name__}: {error}", "server_error")


def error_answer(error: APIError) -> JSONResponse:
    """Returns the response for an error."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 429 else {}
    if error.status in (401, 408, 413):  # The rest of the request has not been read.
        headers["Connection"] = "close"
    return JSONResponse(error_body(error), error.status, headers)


def error_body(error: APIError) -> dict[str, Any]:
    """Body of an error response in OpenAI's format."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.status}}
