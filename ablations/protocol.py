"""What a worker is given and what it gives back; JSON between two processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TrialRequest:
    """One training to run.

    Attributes:
        number: What its answer is known by.
        stage: To build.
        settings: All of them.
        title: The run's name.
        tags: Of its run.
        params: Of its run, beside the settings: what MLflow's charts can show as an axis.
        metric: What is judged.
        after: Whether what is asked for at the stage's end is built too; tuning never touches the test split.
        costs: Whether costs that no stage measures are measured.
        reports: Name of the metric that is told while training runs, so that it may be pruned; empty tells none.
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
    """How a job went.

    Attributes:
        number: The job's.
        kind: ``done``; ``failed``, which is a result with a reason; ``pruned``; ``stopped``, because it was asked to;
            ``crashed``, by an error that nobody foresaw; ``broken``, because something is wrong that a person must
            fix; ``report`` while it runs.
        metrics: Of its run; of a report, the value and its step.
        run_id: Its run, where there is one.
        reason: Why there is no result.
        seconds: That it took.
    """

    number: int
    kind: Literal["done", "failed", "pruned", "stopped", "crashed", "broken", "report"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    run_id: str = ""
    reason: str = ""
    seconds: float = 0.0


def encode(message: TrialRequest | TrialResponse) -> bytes:
    """A message as bytes."""
    return json.dumps(asdict(message)).encode()


def decode_request(content: bytes) -> TrialRequest:
    """What the driver sent."""
    return TrialRequest(**json.loads(content))


def decode_response(content: bytes) -> TrialResponse:
    """What the worker sent."""
    return TrialResponse(**json.loads(content))
