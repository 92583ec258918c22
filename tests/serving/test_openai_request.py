"""OpenAI's parameters: what is understood, what changes nothing, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from answerers import answerer, served

from mmphi.serving import openai_request
from mmphi.serving.api import ServerConfig
from mmphi.serving.http_errors import APIError
from mmphi.serving.openai_request import parse_request

HELLO = [{"role": "user", "content": "hello"}]


def given(**more: Any) -> bytes:
    return json.dumps({"messages": HELLO, **more}).encode()


def test_null_is_a_parameter_that_is_left_out() -> None:
    names = ["model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "tools"]
    assert parse_request(given(**dict.fromkeys(names))).sampling(0.5) == parse_request(given()).sampling(0.5)


@pytest.mark.parametrize(
    "more",
    [
        {"n": 1, "logprobs": False, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "x", "metadata": {"a": "b"}},
        {"modalities": ["text"], "store": True, "service_tier": "auto", "parallel_tool_calls": True},
    ],
)
def test_what_changes_no_answer_is_taken(more: dict[str, Any]) -> None:
    parse_request(given(**more))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("top_logprobs", 2),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"5": 1}),
        ("n", 2),
        ("modalities", ["text", "audio"]),
        ("top_k", 5),
        ("repetition_penalty", 1.1),
        ("stop", [""] * 5),
        ("stop", [1] * 5),
        ("temperature", "warm"),
        ("temperature", -0.5),
        ("temperature", 1e9),
        ("top_p", 0),
        ("seed", 2**70),
        ("seed", -(2**70)),
        ("max_tokens", 0),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(APIError) as caught:
        parse_request(given(**{name: value}))
    assert caught.value.status == 400
    assert caught.value.param == name
    assert len(caught.value.message) < 500


def test_more_values_than_texts_have_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_request, "MAX_MARKS", 1000)
    parse_request(given(stop="," * 200))
    for body in (b'{"messages": [' + b"{}," * 600, b'{"messages": [' + b"[" * 1001, given(stop=["a"] * 1100)):
        with pytest.raises(APIError, match="too many values"):
            parse_request(body)


def test_a_lone_surrogate_is_malformed() -> None:
    with pytest.raises(APIError, match="the request"):
        parse_request(b'{"messages": [{"role": "user", "content": "look \\ud83d here"}]}')


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    rules = ServerConfig("tiny", hosts=("127.0.0.1", "localhost", "::1"), origins=("https://page.example",))
    with served(answerer(), rules, slots=1) as found:
        yield found


def test_errors_of_every_kind_have_openais_shape(address: str) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/completions", 404),
        ("POST", "/v1/chat/completions", 400),
    ):
        answer = httpx.request(method, f"{address}{path}")
        assert answer.status_code == status
        error = answer.json()["error"]
        assert error["message"]
        assert error["code"] == status
    assert httpx.get(f"{address}/v1/models/tiny").json()["id"] == "tiny"


def test_a_page_of_another_origin_may_ask_where_that_is_allowed(address: str) -> None:
    url = f"{address}/v1/chat/completions"
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin, allowed in (("https://page.example", True), ("https://other.example", False)):
        before = httpx.options(url, headers={"Origin": origin, **asks})
        assert (before.status_code == 200) == allowed
        answer = httpx.post(url, content=given(max_tokens=2), headers={"Origin": origin})
        assert (answer.headers.get("access-control-allow-origin") == origin) == allowed


def test_without_a_key_only_this_machines_names_are_served(address: str) -> None:
    for host, status in (("evil.example", 403), ("localhost:1", 200), ("[::1]:80", 200), ("127.0.0.1", 200)):
        assert httpx.get(f"{address}/v1/models", headers={"Host": host}).status_code == status
    rules = ServerConfig("tiny", key="secret", hosts=("127.0.0.1",))
    with served(answerer(), rules, slots=1) as other:
        headers = {"Host": "name.example", "Authorization": "Bearer secret"}
        assert httpx.get(f"{other}/v1/models", headers=headers).status_code == 200


def test_a_stream_is_in_ascii(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmphi.generation.detokenizer import IncrementalDetokenizer

    monkeypatch.setattr(IncrementalDetokenizer, "text", property(lambda self: "a\u2028b" * len(self._ids)))
    body = json.loads(given(max_tokens=2)) | {"stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
        content = answer.read()
    assert content.isascii()
    assert b"a\\u2028b" in content
