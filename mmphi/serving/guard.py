"""Checks in front of a server's application: API key, size of requests, and timeouts of clients."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any
from urllib.parse import urlsplit

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from mmphi.serving.http_errors import APIError, error_answer

PROTECTED = "/v1/"  # Prefix of the paths that require the key.
BODY_S = 60.0  # Timeout of a request's body, in seconds.
WRITE_S = 60.0  # Timeout of a client that does not read its response, in seconds.
HEADERS_S = 10.0  # Timeout of a request's headers, in seconds from the connection or a later request's first bytes.


class Guard:
    """Refuses requests without the key before their body is read, and too large bodies while they arrive.

    Args:
        app: The guarded ASGI application.
        key: API key that requests under :data:`PROTECTED` must carry; empty for none.
        largest: Largest body, in bytes.
        body_s: Timeout of the body, in seconds.
        hosts: ``Host`` names that are accepted if there is no key; empty for any. Otherwise a web page whose host name
            resolves to this machine could send requests (DNS rebinding).
    """

    def __init__(self, app: Any, key: str, largest: int, body_s: float = BODY_S, hosts: tuple[str, ...] = ()) -> None:
        self.app, self.key, self.largest, self.body_s, self.hosts = app, key, largest, body_s, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"].startswith(PROTECTED) and not self._allowed(headers.get(b"authorization", b"")):
            await error_answer(APIError(401, "the key is missing or wrong", "authentication_error"))(
                scope, receive, send
            )
            return
        if self.hosts and not self.key:
            host = headers.get(b"host", b"").decode("latin-1")
            if _host_name(host) not in self.hosts:
                wrong = APIError(403, f"the host {host[:100]!r} is not served without a key", "permission_error")
                await error_answer(wrong)(scope, receive, send)
                return
        refused = APIError(413, f"the request has more than {self.largest:,} bytes")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self.largest:
            await error_answer(refused)(scope, receive, send)
            return
        came, complete, end = 0, False, asyncio.get_running_loop().time() + self.body_s

        async def limited() -> Any:
            nonlocal came, complete
            if complete:  # Only the disconnect message follows.
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise APIError(408, f"the request did not come within {self.body_s:g} s", "timeout_error") from None
            came += len(message.get("body", b""))
            if came > self.largest:
                raise refused
            complete = not message.get("more_body", False)
            return message

        await self.app(scope, limited, send)

    def _allowed(self, authorization: bytes) -> bool:
        return not self.key or hmac.compare_digest(authorization.removeprefix(b"Bearer "), self.key.encode())


def _host_name(host: str) -> str:
    """Host name of a ``Host`` header, without the port; empty if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class TimedProtocol(AutoHTTPProtocol):  # type: ignore[valid-type, misc]  # One of two classes, chosen at run time.
    """uvicorn's protocol, with timeouts of request headers and of clients that do not read their response."""

    headers_s, write_s = HEADERS_S, WRITE_S
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the header timeout."""
        super().connection_made(transport)
        self._waiting = self.loop.call_later(self.headers_s, self._close)

    def data_received(self, data: bytes) -> None:
        """Stop the header timeout once a request has begun; restart it with the first bytes of a later one."""
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._waiting.cancel()
        elif (before is None or before.response_complete) and self._waiting.cancelled():
            self._waiting = self.loop.call_later(self.headers_s, self._close)

    def pause_writing(self) -> None:
        """Start the write timeout: the write buffer is full."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the write timeout: the client has read."""
        self._stop_waiting_for_reader()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop both timeouts."""
        self._waiting.cancel()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def _stop_waiting_for_reader(self) -> None:
        if self._unread is not None:
            self._unread.cancel()

    def _close(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
