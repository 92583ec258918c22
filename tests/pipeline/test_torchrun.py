from __future__ import annotations

import json
import os
import re

import pytest
import toys
from forked import run_ranks

from mmphi.pipeline.torchrun import without_torchrun
from mmphi.tracking.run_writer import TrackingStore


def test_variables_of_torchrun_are_hidden_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with without_torchrun():
        assert "WORLD_SIZE" not in os.environ
    assert os.environ["WORLD_SIZE"] == "2"


def torchrun(stage: str) -> list[dict]:
    """What two processes say of a stage that both were asked for."""
    found = []
    for done in run_ranks([toys.__file__, stage], 2):
        assert done.returncode == 0, done.stderr
        found += [json.loads(line) for line in re.findall(r"{\"run_id.*?}}", done.stdout)]
    return found


@pytest.mark.slow
def test_stage_that_does_not_train_runs_once(empty_store: str) -> None:
    results = torchrun("draw")
    assert len(results) == 2
    assert results[0] == results[1]
    assert len(list(TrackingStore(empty_store).search(stage="draw"))) == 1


@pytest.mark.slow
def test_two_processes_share_one_run(empty_store: str) -> None:
    """Both train on the same files; the first alone builds what is upstream, and records."""
    results = torchrun("train")
    assert {result["metrics"]["rank"] for result in results} == {0, 1}
    assert results[0]["run_id"] == results[1]["run_id"]
    assert results[0]["path"] == results[1]["path"]
    store = TrackingStore(empty_store)
    assert [len(list(store.search(stage=name))) for name in ("draw", "train")] == [1, 1]
    assert store.is_result(next(store.search(stage="train")))
