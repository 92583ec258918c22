from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from mmphi.config import LanguageSettings
from mmphi.data import hf_connectivity
from mmphi.errors import ModelError
from mmphi.models.language.language_model import load_language_model


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a process that nobody told to stay offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    hf_connectivity.hub_is_reachable.cache_clear()
    yield
    hf_connectivity.hub_is_reachable.cache_clear()


class Endpoint(HTTPServer):
    """Answers everything with one status."""

    def __init__(self, status: int) -> None:
        self.status, self.asked = status, 0
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.server.asked += 1
        self.send_response(self.server.status)
        self.end_headers()


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(("status", "there"), [(200, True), (404, True), (403, False), (407, False), (503, False)])
def test_hub_is_in_reach_where_it_answers_and_no_proxy_refuses(online, monkeypatch, status, there):
    with Endpoint(status) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint.address)
        assert hf_connectivity.hub_is_reachable() is there
        assert hf_connectivity.hub_is_reachable() is there
        assert endpoint.asked == 1
        endpoint.shutdown()
    assert constants.HF_HUB_OFFLINE is not there


def test_it_is_asked_through_the_proxy_of_the_environment(online, monkeypatch):
    """A socket of our own would say nothing about a hub behind a proxy."""
    with Endpoint(200) as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
        assert hf_connectivity.hub_is_reachable()
        assert proxy.asked == 1
        proxy.shutdown()


def test_without_a_hub_its_client_goes_offline_and_the_error_names_the_local_way(online, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    with pytest.raises(ModelError, match="it cannot be downloaded from the hub") as caught:
        load_language_model(LanguageSettings(model="nobody/nothing"), None, "cpu")
    assert "give the path of a folder" in caught.value.hint
    assert constants.HF_HUB_OFFLINE is True
