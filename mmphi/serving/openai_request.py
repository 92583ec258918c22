"""Requests of OpenAI's chat completions: supported, ignored and refused parameters."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mmphi.generation.messages import MAX_LETTERS
from mmphi.generation.sampling import MAX_TEMPERATURE, SEEDS, SamplingParams
from mmphi.serving.http_errors import APIError

MAX_TOKENS = 256
MAX_STOPS, MAX_STOP_LETTERS = 4, 256  # Four as in OpenAI's API; each is searched for at every token.
# Characters that separate the values of JSON. Texts may contain them. More of them would mean so many values that
# parsing blocks all other requests.
MAX_MARKS, MARKS = MAX_LETTERS + 100_000, (b",", b"[", b"{")

# Unsupported parameters, with the values that have no effect. Any other value is refused.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Parameters that do not change the answer; they are ignored.
HARMLESS = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """Body of ``/v1/chat/completions``, with OpenAI's names. A parameter that is null counts as left out."""

    model_config = ConfigDict(extra="allow")

    messages: list[Any]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=SEEDS.start, lt=SEEDS.stop)
    stop: str | list[str] | None = None

    @field_validator("stop", mode="before")  # Before the texts are validated, of which there may be a million.
    @classmethod
    def _few_stops(cls, stop: Any) -> Any:
        texts = stop if isinstance(stop, list) else [stop]
        if len(texts) > MAX_STOPS or any(isinstance(text, str) and len(text) > MAX_STOP_LETTERS for text in texts):
            raise ValueError(f"at most {MAX_STOPS} stop texts of at most {MAX_STOP_LETTERS} characters are allowed")
        if "" in texts:
            raise ValueError("a text to stop at is empty")
        return stop

    def sampling(self, temperature: float) -> SamplingParams:
        """Sampling parameters of the answer.

        Args:
            temperature: Default if the request has none.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            self.max_completion_tokens or self.max_tokens or MAX_TOKENS,
            temperature if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            self.seed,
            tuple(stop),
        )


def parse_request(body: bytes) -> ChatRequest:
    """Parse the body of a request.

    Args:
        body: JSON.

    Raises:
        APIError: If it is malformed or uses something that is not supported; the error names the parameter.
    """
    if sum(body.count(mark) for mark in MARKS) > MAX_MARKS:
        raise APIError(400, "the request has too many values")
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise APIError(400, f"{where or 'the request'}: {first['msg']}", param=where or None) from error
    for name, value in (request.model_extra or {}).items():
        if value is None or name in HARMLESS or value in NEUTRAL.get(name, ()):
            continue
        raise APIError(400, f"{name} = {reprlib.repr(value)} is not supported and would change the answer", param=name)
    return request
