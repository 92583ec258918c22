"""What stands before a server's application: the key, the size of requests, and the time that clients may take."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any
from urllib.parse import urlsplit

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from mmphi.serving.http_errors import APIError, error_answer

PROTECTED = "/v1/"  # Paths that need the key.
BODY_S = 60.0  # Longest time for the body of a request.
WRITE_S = 60.0  # Longest time in which a client reads nothing of an answer.
HEADERS_S = 10.0  # Longest time for its headers, from the connection or the last answer on.


class Guard:
    """Refuses requests without the key before anything of their body is read, and bodies too large while they come.

    Args:
        app: What follows.
        key: That every request must bring; none where empty.
        largest: Bytes of a request.
        body_s: Longest time for its body, in seconds.
        hosts: Names that a request may give as its ``Host`` where there is no key; any where empty. A page in a browser
            whose own name leads to this machine could ask otherwise (DNS rebinding).
    """

    def __init__(self, app: Any, key: str, largest: int, body_s: float = BODY_S, hosts: tuple[str, ...] = ()) -> None:
        self.app, self.key, self.largest, self.body_s, self.hosts = app, key, largest, body_s, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it by an error."""
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
            if complete:  # What comes now is that the client has left.
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
    """The name in a ``Host``, without the port; empty where it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class TimedProtocol(AutoHTTPProtocol):  # type: ignore[valid-type, misc]  # Which of two classes is found at run time.
    """uvicorn's protocol, which also ends connections whose request does not come, or whose answer is not read."""

    headers_s, write_s = HEADERS_S, WRITE_S
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._waiting = self.loop.call_later(self.headers_s, self._close)

    def data_received(self, data: bytes) -> None:
        """Wait no longer once a request has begun; wait for the next one after its answer."""
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._waiting.cancel()
        elif (before is None or before.response_complete) and self._waiting.cancelled():
            self._waiting = self.loop.call_later(self.headers_s, self._close)

    def pause_writing(self) -> None:
        """Wait for the client to read: its buffers are full."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: it has read."""
        self._stop_waiting_for_reader()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._waiting.cancel()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def _stop_waiting_for_reader(self) -> None:
        if self._unread is not None:
            self._unread.cancel()

    def _close(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
