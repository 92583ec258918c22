"""What MLflow's pages show in addition to metrics: data, model, system metrics, and the view of an experiment."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import toys
from mlflow.entities import Metric

from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.stage import Result
from mmphi.stages import load_settings
from mmphi.tracking.datasets import datasets_of, log_datasets
from mmphi.tracking.logged_model import log_results
from mmphi.tracking.run_writer import TrackingStore
from mmphi.tracking.system_metrics import SWITCH, system_metrics
from mmphi.tracking.view_state import HEADLINES, TAG, share, view_state


@pytest.fixture
def store(empty_store: str) -> TrackingStore:
    return TrackingStore()


def begun(store: TrackingStore, **metrics: list[float]) -> str:
    run = store.client.create_run(store.experiment())
    for name, values in metrics.items():
        for step, value in enumerate(values):
            store.client.log_metric(run.info.run_id, name.replace("__", "/"), value, step=step * 10)
    return str(run.info.run_id)


def test_the_view_shows_losses_and_results_first_and_curves_as_lines(store: TrackingStore) -> None:
    experiment = store.experiment()
    begun(store, align__loss=[3.0, 2.0], val__loss=[2.0, 1.0], test__exact_match=[0.5], mine__score=[1.0])
    address = share(store.client, experiment, ["mine/score"], "mine")
    assert address == "viewStateShareKey=mine"
    state = json.loads(store.client.get_experiment(experiment).tags[f"{TAG}mine"])
    charts = [(chart["metricKey"], chart["type"]) for chart in state["compareRunCharts"]]
    assert charts == [("mine/score", "BAR"), ("val/loss", "LINE"), ("test/exact_match", "BAR")]
    assert "metrics.`val/loss`" in state["selectedColumns"]
    largest = view_state(HEADLINES, HEADLINES[:3])
    assert len(json.dumps(largest, separators=(",", ":"))) < 5000  # MLflow's limit of a tag.
    assert state["compareRunSections"][0]["name"] == "Results"
    assert not any("align" in column for column in state["selectedColumns"])


def test_files_and_data_of_other_stages_are_datasets_of_the_run(store: TrackingStore, tmp_path: Path) -> None:
    parts = {"data.sources.0.path": f"sha256:{'ab' * 32}", "vision.pretrained": f"sha256:{'cd' * 32}", "x": 1}
    settings = {"data.sources.0.path": "/somewhere/captions.csv", "vision.pretrained": "/weights.pt"}
    needed = {
        "scenes": Result("scenes", "k" * 40, "r1", tmp_path, {}),
        "pretrain": Result("pretrain", "p", "r2", tmp_path, {}),
    }
    run = begun(store)
    log_datasets(store.client, run, datasets_of(parts, settings, needed), "training")
    inputs = store.client.get_run(run).inputs.dataset_inputs
    assert {(each.dataset.name, each.dataset.source) for each in inputs} == {
        ("captions.csv", "/somewhere/captions.csv"),
        ("scenes", "runs:/r1"),
    }
    assert {tag.value for each in inputs for tag in each.tags} == {"training"}
    log_datasets(store.client, run, [], "training")


def test_results_are_linked_to_the_model_and_add_no_point_to_a_curve(store: TrackingStore) -> None:
    run = begun(store, val__loss=[2.0, 1.0], train__loss=[3.0, 2.5])
    model = store.client.create_logged_model(store.experiment(), name="m", source_run_id=run)
    log_results(store.client, store.run(run), model.model_id)
    assert len(store.client.get_metric_history(run, "val/loss")) == 2
    metrics = store.client.get_logged_model(model.model_id).metrics
    assert [(metric.key, metric.value) for metric in metrics] == [("val/loss", 1.0)]


def test_system_metrics_are_recorded_unless_they_are_switched_off(
    store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run, off = begun(store), begun(store)

    def recorded(run_id: str) -> list[Metric]:
        return [name for name in store.run(run_id).data.metrics if name.startswith("system/")]

    with system_metrics(run, store.uri):
        for _ in range(200):
            if recorded(run):
                break
            time.sleep(0.05)
    assert "system/cpu_utilization_percentage" in recorded(run)
    monkeypatch.setenv(SWITCH, "false")
    with system_metrics(off, store.uri):
        pass
    assert not recorded(off)


def test_a_runs_page_is_that_of_trainings(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Pipeline(toys.TOYS).build("draw", load_settings("tiny"))
    address = TrackingStore().address(result.run_id)
    assert address.startswith("http://127.0.0.1:5000/#/experiments/")
    assert address.endswith(f"/runs/{result.run_id}?workflowType=machine_learning")
    monkeypatch.setenv("MMPHI_UI", "http://127.0.0.1:5050/")
    assert TrackingStore().address(result.run_id).startswith("http://127.0.0.1:5050/#/experiments/")


def test_final_numbers_stand_at_the_end_of_their_curves(store: TrackingStore) -> None:
    with store.building("key", "title", {"mmphi.stage": "x", "mmphi.key": "key"}, "", lambda _: None) as (tracker, _):
        for step, loss in ((10, 2.0), (20, 1.0)):
            tracker.metrics({"val/loss": loss, "val/best": loss}, step)
        tracker.final_metrics({"val/loss": 1.0, "val/best": 0.9, "seconds": 3.0})
        tracker.flush()
        points = {
            name: [(point.step, point.value) for point in store.client.get_metric_history(tracker.run_id, name)]
            for name in ("val/loss", "val/best", "seconds")
        }
    assert points["val/loss"] == [(10, 2.0), (20, 1.0)]
    assert set(points["val/best"]) == {(10, 2.0), (20, 1.0), (20, 0.9)}
    assert points["seconds"] == [(0, 3.0)]
    assert store.run(tracker.run_id).data.metrics["val/best"] == 0.9
