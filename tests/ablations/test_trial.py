"""What a trial takes for its result."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ablations.protocol import TrialRequest
from ablations.trial import run_trial
from mmphi.pipeline.stage import Result
from mmphi.stages import load_settings
from mmphi.tracking.run_writer import TrackingStore
from reports.study_query import trial_of

TAGS = {"mmphi.study": "one", "mmphi.level": "a", "mmphi.round": "0", "mmphi.phase": "verdict"}


def finished(store: TrackingStore, tags: dict[str, str], **metrics: float) -> str:
    tracker = store.begin("a run", tags)
    tracker.metrics({name.replace("__", "/"): value for name, value in metrics.items()})
    tracker.flush()
    store.client.set_terminated(tracker.run_id, "FINISHED")
    return tracker.run_id


@pytest.fixture
def job() -> TrialRequest:
    settings = load_settings("tiny", {}).model_dump()
    return TrialRequest(1, "projector", settings, "a trial", TAGS, {"study.level": "a"}, "test/loss")


def pipeline(store: TrackingStore, result: Result) -> Any:
    return SimpleNamespace(store=store, build=lambda *_, **__: result)


def test_it_is_judged_by_the_evaluation_that_it_asked_for(empty_store: str, job: TrialRequest) -> None:
    """The run shows another evaluation's figures too, which came later."""
    store = TrackingStore()
    evaluation = finished(store, {}, test__loss=1.0)
    run = finished(store, TAGS, val__loss=0.5, test__loss=9.0)
    after = Result("evaluate", "k", evaluation, Path("x"), {"test/loss": 1.0})
    result = Result("projector", "k", run, Path("x"), {"val/loss": 0.5, "test/loss": 1.0}, after=(after,))
    answer = run_trial(job, pipeline(store, result))
    assert (answer.kind, answer.metrics["test/loss"]) == ("done", 1.0)
    assert store.run(run).data.tags["mmphi.judged_by"] == evaluation


def test_no_number_is_a_failure_with_a_reason(empty_store: str, job: TrialRequest) -> None:
    store = TrackingStore()
    evaluation = finished(store, {}, test__loss=float("nan"))
    run = finished(store, TAGS, val__loss=0.5, test__loss=3.0)
    after = Result("evaluate", "k", evaluation, Path("x"), {"test/loss": float("nan")})
    answer = run_trial(
        job, pipeline(store, Result("projector", "k", run, Path("x"), {"val/loss": 0.5}, after=(after,)))
    )
    assert (answer.kind, answer.reason) == ("failed", "test/loss = nan at step 0")
    assert trial_of(store.run(run)).level == "a"
