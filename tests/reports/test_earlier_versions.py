"""Studies that were recorded under former names of settings and metrics are read under their current ones."""

from __future__ import annotations

import json

from mlflow.entities import Metric, Param

from ablations.study_run import StudyRun
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


def test_metrics_of_an_earlier_version(empty_store: str) -> None:
    """Values, curves, values that are not finite, and the declaration of a study about a renamed metric."""
    store = TrackingStore()
    declared = {
        **{"question": "q", "factor": "projector.layers", "levels": {"a": 1, "b": 2}, "baseline": "a", "seeds": 1},
        **{"metric": "test/hearing_gain", "also": {"test/ended": "answers that end"}, "stage": "speech"},
        **{"settings": {"evaluate.links": []}},
    }
    record = store.begin("study", {"mmphi.study_record": "s"})
    record.text("study.json", json.dumps(declared))
    for level in ("a", "b"):
        tags = {"mmphi.study": "s", "mmphi.level": level, "mmphi.phase": "verdict", "mmphi.round": "0"}
        trial = store.begin("trial", tags)
        points = [Metric("val/hearing_gain", 0.1 * step, step, step) for step in range(1, 4)]
        store.client.log_batch(trial.run_id, metrics=points)
        if level == "a":
            evaluation = store.begin("evaluation", {})
            store.client.log_metric(evaluation.run_id, "test/hearing_gain", 2.0)
            store.client.set_terminated(evaluation.run_id, "FINISHED")
            store.client.set_tag(trial.run_id, "mmphi.judged_by", evaluation.run_id)
            store.client.log_metric(trial.run_id, "test/audio_gain", 9.0)
        else:
            store.client.set_tag(trial.run_id, "mmphi.not_finite", "test/hearing_gain = nan at step 3")
        store.client.set_terminated(trial.run_id, "FINISHED")
    data = load_study(store, "s", ("val/audio_gain",))
    assert (data.declaration["metric"], list(data.declaration["also"])) == ("test/audio_gain", ["test/eos_rate"])
    assert data.values("test/audio_gain") == {"a": {0: 2.0}, "b": {}}
    assert [trial.reason for trial in data.failed()] == ["test/hearing_gain = nan at step 3"]
    assert [[step for step, _ in curve] for curve in data.curves.values()] == [[1, 2, 3]] * 2
    # The same study under current names is no other study.
    settings = {"settings": {"evaluate.audio_inputs": []}}
    current = {**declared, "metric": "test/audio_gain", "also": {"test/eos_rate": "answers that end"}, **settings}
    assert StudyRun.open(store, "s", current).run_id == record.run_id
