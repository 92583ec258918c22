"""Messages between the driver and its worker processes, encoded as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TrialRequest:
    """One training to run.

    Attributes:
        number: Identifier of the request, repeated in its responses.
        stage: Stage to build.
        settings: All settings of the pipeline.
        title: Name of the MLflow run.
        tags: Tags of the MLflow run.
        params: Parameters of the MLflow run in addition to the settings, for the axes of MLflow's charts.
        metric: Name of the judged metric.
        after: Whether to build the follow-up stages too; tuning trials do not, so they never use the test split.
        costs: Whether to measure the costs that no stage measures.
        reports: Name of the metric to report during training, for pruning; empty reports none.
    """

    number: int
    stage: str
    settings: Mapping[str, Any]
    title: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metric: str
    after: bool = True
    costs: bool = True
    reports: str = ""


@dataclass(frozen=True)
class TrialResponse:
    """Outcome or progress report of a request.

    Attributes:
        number: Number of the request; -1 in a worker's ready message and in the driver's replies.
        kind: ``done``; ``failed``, a final result without a value; ``pruned``; ``stopped`` by a signal; ``crashed`` by
            an unexpected exception; ``broken`` by an error that requires manual intervention; ``report`` during
            training.
        metrics: Metrics of the run; for a report, the value and its step.
        run_id: Id of the MLflow run; empty without a result.
        reason: Why there is no result.
        seconds: Duration of the job in seconds; 0 if it was not measured.
    """

    number: int
    kind: Literal["done", "failed", "pruned", "stopped", "crashed", "broken", "report"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    run_id: str = ""
    reason: str = ""
    seconds: float = 0.0


def encode(message: TrialRequest | TrialResponse) -> bytes:
    """Encode a message as JSON bytes."""
    return json.dumps(asdict(message)).encode()


def decode_request(content: bytes) -> TrialRequest:
    """Decode a request of the driver."""
    return TrialRequest(**json.loads(content))


def decode_response(content: bytes) -> TrialResponse:
    """Decode a response of a worker."""
    return TrialResponse(**json.loads(content))
