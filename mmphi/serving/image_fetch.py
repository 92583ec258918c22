"""Fetches images by URL, for servers that allow it."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from mmphi.data.images import MAX_FILE_BYTES
from mmphi.errors import SettingsError
from mmphi.generation.messages import MessageError

SECONDS = 10.0
HERE = ("localhost",)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: an allowed URL does not allow the target of its redirect."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _check_place(host: str) -> None:
    """Refuse a host name that resolves to an address of this machine or its network.

    An IP address and ``localhost`` pass, because an allowed prefix names them explicitly.

    Raises:
        MessageError: If it does, or cannot be resolved.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if host in HERE:
            return
        try:
            found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)}
        except OSError as error:
            raise MessageError(
                f"{host} cannot be resolved: {error}", "send the image itself, as a data: URI"
            ) from error
        if not all(ipaddress.ip_address(each).is_global for each in found):
            raise MessageError(
                f"{host} resolves to an address that is not public", "send the image itself, as a data: URI"
            ) from None


def _check_peer(connection: http.client.HTTPConnection) -> None:
    """Refuse a connection to a non-public address: the name may resolve differently after :func:`_check_place`.

    Raises:
        OSError: If the host is a name and its address is not public.
    """
    host = connection.host.lower()
    try:
        ipaddress.ip_address(host)
    except ValueError:
        peer = str(connection.sock.getpeername()[0]).partition("%")[0]
        if host not in HERE and not ipaddress.ip_address(peer).is_global:
            connection.close()
            raise OSError(f"{host} resolves to an address that is not public") from None


class _HTTPConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self)


class _HTTPSConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _check_peer(self)


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPConnection, req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HTTPSConnection, req, context=ssl.create_default_context())


def _normal(url: str) -> tuple[str, str]:
    """Scheme, host and port of a URL, and its fully decoded path.

    Raises:
        ValueError: If it is malformed, or contains parts that servers interpret differently.
    """
    parts = urlsplit(url)
    if parts.username is not None or "\\" in url or any(letter <= " " or letter > "~" for letter in url):
        raise ValueError(url)
    path = parts.path
    while (plain := unquote(path)) != path:  # A server may decode %252e to a dot, too.
        path = plain
    steps = path.split("/")
    if ".." in steps or "." in steps:
        raise ValueError(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return f"{parts.scheme}://{parts.hostname}:{port}", path


def image_fetcher(prefixes: Sequence[str]) -> Callable[[str], bytes]:
    """Returns a function that fetches images whose URL has one of some prefixes, and refuses all others.

    Args:
        prefixes: Allowed prefixes, each with scheme, host and the beginning of a path: ``https://example.org/images/``.

    Raises:
        SettingsError: If a prefix lacks one of these parts, or its scheme is not HTTP or HTTPS.
    """
    for prefix in prefixes:
        parts = urlsplit(prefix)
        if parts.scheme not in ("http", "https") or not parts.hostname or not parts.path:
            raise SettingsError(f"{prefix!r} is not a URL prefix", "give scheme, host and path: https://example.org/")
    handlers = (_HTTPHandler, _HTTPSHandler, _NoRedirect, urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)

    allowed = [_normal(prefix) for prefix in prefixes]

    def fetch(url: str) -> bytes:
        try:
            origin, host = _normal(url), urlsplit(url).hostname or ""
        except ValueError:
            origin, host = ("", ""), ""
        if not any(origin[0] == place and origin[1].startswith(path) for place, path in allowed):
            raise MessageError(f"{url[:100]} is not fetched", "send the image itself, as a data: URI")
        _check_place(host)
        try:
            data, end = b"", time.monotonic() + SECONDS
            with opener.open(urllib.request.Request(url), timeout=SECONDS) as answer:
                while len(data) <= MAX_FILE_BYTES and (more := answer.read1(1 << 20)):
                    data += more
                    if time.monotonic() > end:
                        raise TimeoutError(f"it took more than {SECONDS:g} s")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise MessageError(f"{url[:100]} could not be fetched: {error}", "send the image itself") from error
        if len(data) > MAX_FILE_BYTES:
            raise MessageError(f"{url[:100]} has more than {MAX_FILE_BYTES:,} bytes", "send a smaller image")
        return data

    return fetch
