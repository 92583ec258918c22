from __future__ import annotations

import os
import socket

import pytest
from huggingface_hub import constants

from mmphi.data import reach
from mmphi.errors import ModelError
from mmphi.models.language import load_language
from mmphi.settings import LanguageSettings


@pytest.fixture
def online(monkeypatch):
    """As a process that nobody told to stay offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    reach.hub_in_reach.cache_clear()
    yield
    reach.hub_in_reach.cache_clear()


def test_a_hub_that_answers_is_in_reach(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert reach.hub_in_reach()
    assert constants.HF_HUB_OFFLINE is False


def test_without_a_hub_its_client_goes_offline_and_the_error_names_the_local_way(online, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(ModelError, match="the hub did not give it") as caught:
        load_language(LanguageSettings(model="nobody/nothing"), None, "cpu")
    assert "give the path of a folder" in caught.value.hint
    assert constants.HF_HUB_OFFLINE is True


def test_hub_is_asked_once(online, monkeypatch):
    calls = []
    monkeypatch.setattr(
        socket, "create_connection", lambda *a, **k: calls.append(a) or (_ for _ in ()).throw(OSError())
    )
    assert not reach.hub_in_reach()
    assert not reach.hub_in_reach()
    assert len(calls) == 1
