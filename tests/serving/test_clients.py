"""Requests as LangChain's ChatOpenAI and LiteLLM send them.

``client_requests.json`` holds the bodies that their calls sent to a local server that recorded them, the version of
the package that sent each, and the parameter that mmphi refuses, where it refuses one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from answerers import answerer, served

REQUESTS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "client_requests.json").read_text())


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(answerer(), slots=1) as found:
        yield found


@pytest.mark.parametrize("sent", REQUESTS, ids=lambda sent: str(sent["client"]))
def test_a_request_is_answered_or_refused_with_the_parameter_named(address: str, sent: dict[str, Any]) -> None:
    answer = httpx.post(f"{address}/v1/chat/completions", json=sent["body"], timeout=60)
    if sent["refused"]:
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == sent["refused"]
        assert answer.json()["error"]["type"] == "invalid_request_error"
    elif sent["body"].get("stream"):
        events = [line[6:] for line in answer.text.splitlines() if line]
        assert events.pop() == "[DONE]"
        chunks = [json.loads(event) for event in events]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert chunks[-1]["usage"]["completion_tokens"] >= 1
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]][-1] in ("stop", "length")
    else:
        found = answer.json()
        assert answer.status_code == 200
        assert found["choices"][0]["message"]["role"] == "assistant"
        assert found["usage"]["completion_tokens"] <= sent["body"].get("max_tokens", 256)


def test_the_same_conversation_gets_the_same_answer_whichever_client_asks(address: str) -> None:
    def both(name: str) -> list[str]:
        bodies = [each["body"] for each in REQUESTS if each["client"].endswith(f": {name}")]
        answers = [httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60) for body in bodies]
        return [answer.json()["choices"][0]["message"]["content"] for answer in answers]

    first, second = both("settings")
    assert first == second
