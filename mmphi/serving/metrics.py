"""Prometheus metrics of a server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mmphi.serving.scheduler import QueuedRequest, QueueFullError, RequestTimeoutError

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Prometheus metrics of one server.

    Args:
        open_tickets: Returns the number of queued and running requests.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, open_tickets: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("mmphi_requests", "Questions, by how they ended", ["ended"], registry=self._registry)
        self._tokens = Counter("mmphi_tokens", "Tokens, by what they are", ["kind"], registry=self._registry)
        self._first = Histogram(
            "mmphi_first_token_seconds", "Until the first token", buckets=SECONDS, registry=self._registry
        )
        self._whole = Histogram(
            "mmphi_answer_seconds", "Until the last token", buckets=SECONDS, registry=self._registry
        )
        Gauge("mmphi_open", "Requests that are queued or being answered", registry=self._registry).set_function(
            open_tickets
        )

    def ended(self, queued: QueuedRequest, seconds: float) -> None:
        """Count an accepted request at its end.

        Args:
            queued: The request.
            seconds: Seconds since it arrived.
        """
        how: str = "error" if queued.error is not None else queued.reason or "cancelled"
        if isinstance(queued.error, RequestTimeoutError):
            how = "too slow"
        self._requests.labels("cancelled" if queued.gone and how != "stop" else how).inc()
        self._tokens.labels("prompt").inc(queued.prompt_tokens)
        self._tokens.labels("remembered").inc(queued.reused)
        self._tokens.labels("said").inc(queued.tokens)
        if queued.first_s:
            self._first.observe(queued.first_s)
        if queued.error is None:
            self._whole.observe(seconds)

    def refused(self, error: Exception) -> None:
        """Count a request that was not accepted."""
        self._requests.labels("full" if isinstance(error, QueueFullError) else "refused").inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
