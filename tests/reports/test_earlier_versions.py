"""Studies that were recorded under former names of settings are read under today's."""

from __future__ import annotations

import json

from mlflow.entities import Param

from mmphi.tracking.run_writer import TrackingStore
from reports.study_query import load_study
from reports.tables import used_at


def test_declaration_and_trials_of_an_earlier_version(empty_store: str) -> None:
    store = TrackingStore()
    declared = {
        **{"question": "q", "factor": "projector.views", "levels": {"a": 1, "b": 2}, "baseline": "a", "seeds": 1},
        **{"metric": "val/loss", "unit": "nats", "direction": "minimize", "margin": 0.0, "stage": "projector"},
        **{"nuisance": {"projector.warmup": [0.1, 0.2]}, "tuning_seeds": [1000], "preset": "tiny", "fixed": {}},
    }
    record = store.begin("study", {"mmphi.study_record": "s"})
    record.text("study.json", json.dumps(declared))
    trial = store.begin("trial", {"mmphi.study": "s", "mmphi.level": "a", "mmphi.phase": "verdict", "mmphi.round": "0"})
    store.client.log_batch(trial.run_id, params=[Param("projector.warmup", "0.1")])
    store.client.log_metric(trial.run_id, "val/loss", 1.0)
    store.client.set_terminated(trial.run_id, "FINISHED")
    data = load_study(store, "s")
    assert data.declaration["factor"] == "projector.num_augmentations"
    assert list(data.declaration["nuisance"]) == ["projector.warmup_ratio"]
    assert used_at(data, "a") == [("0.1",)]
