from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmphi.tracking.run_tracker import RunTracker
from mmphi.tracking.run_writer import TrackingStore


@pytest.fixture
def store(empty_store: str) -> TrackingStore:
    return TrackingStore(empty_store)


@pytest.fixture
def tracker(store: TrackingStore) -> RunTracker:
    return store.begin("a run", {"mmphi.key": "k"})


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (600, 300), "red").save(path)
    return path


def table(tracker: RunTracker, name: str) -> dict[str, Any]:
    return dict(json.loads((tracker.folder / f"{name}.json").read_text()))


def test_metrics_are_sent_together_and_all_arrive(
    store: TrackingStore, tracker: RunTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    log_batch = store.client.log_batch

    def counting(run_id: str, metrics: Any = (), **rest: Any) -> None:
        sent.append(len(metrics))
        log_batch(run_id, metrics=list(metrics), **rest)

    monkeypatch.setattr(store.client, "log_batch", counting)
    monkeypatch.setattr("mmphi.tracking.run_tracker.time.monotonic", lambda: 0.0)
    for step in range(1200):
        tracker.metrics({"train/loss": step}, step)
    tracker.flush()
    assert max(sent) <= 500
    assert len(sent) < 6
    history = store.client.get_metric_history(tracker.run_id, "train/loss")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [(i, i) for i in range(1200)]


def test_numbers_that_are_not_finite_are_told_and_kept_out_of_charts(store: TrackingStore, tracker: RunTracker) -> None:
    tracker.metrics({"val/loss": math.nan, "val/gain": 1.0}, 3)
    tracker.metrics({"train/loss": math.inf}, 4)
    tracker.flush()
    run = store.client.get_run(tracker.run_id)
    assert run.data.metrics == {"val/gain": 1.0}
    assert run.data.tags["mmphi.not_finite"] == "val/loss = nan at step 3; train/loss = inf at step 4"


def test_params_are_never_empty_and_never_too_long(store: TrackingStore, tracker: RunTracker) -> None:
    tracker.params({"a": "", "b": [], "c": "x" * 10_000, **{f"n.{i}": i for i in range(250)}})
    params = store.client.get_run(tracker.run_id).data.params
    assert (params["a"], params["b"], len(params["c"]), len(params)) == ("(none)", "[]", 6000, 253)


def test_table_with_pictures(store: TrackingStore, tracker: RunTracker, photo: Path) -> None:
    for step in (1, 2):
        rows = [{"step": step, "image": path, "said": "it costs $5 and $6"} for path in (photo, "", photo)]
        tracker.table("predictions", rows, image="image")
    shown = table(tracker, "predictions")
    assert shown["columns"] == ["step", "image", "said"]
    assert [row[0] for row in shown["data"]] == [2, 2, 2, 1, 1, 1]  # The newest first.
    cell = shown["data"][0][1]
    assert set(cell) == {"type", "filepath", "compressed_filepath"}
    assert cell["type"] == "image"
    assert shown["data"][1][1] == ""
    with Image.open(tracker.folder / cell["filepath"]) as picture:
        assert picture.size == (256, 128)
    assert (tracker.folder / cell["compressed_filepath"]).exists()
    assert len(list((tracker.folder / "table_images").rglob("*.png"))) == 1
    with Image.open(tracker.folder / "figures" / "predictions.png") as grid:
        assert grid.width > 256
    tag = json.loads(store.client.get_run(tracker.run_id).data.tags["mlflow.loggedArtifacts"])
    assert tag == [{"path": "predictions.json", "type": "table"}]


def test_mlflow_reads_the_table_back(store: TrackingStore, tracker: RunTracker) -> None:
    tracker.table("data_read", [{"source": "a", "rows": 1}, {"source": "b", "more": math.nan}])
    from mlflow.artifacts import load_dict

    found = load_dict(f"{store.client.get_run(tracker.run_id).info.artifact_uri}/data_read.json")
    assert found == {"columns": ["source", "rows", "more"], "data": [["a", 1, None], ["b", None, "nan"]]}


def test_tables_of_a_dead_run_are_gone_on_with(store: TrackingStore, tracker: RunTracker) -> None:
    for step in (100, 200, 300):
        tracker.table("predictions", [{"step": step, "said": "before"}])
    tracker.table("data_read", [{"source": "a"}])
    again = RunTracker(store.client, tracker.run_id, tracker.folder, remote=False)
    again.table("predictions", [{"step": 200, "said": "after"}])
    again.table("data_read", [{"source": "a"}])
    assert table(again, "predictions")["data"] == [[200, "after"], [100, "before"]]
    assert table(again, "data_read")["data"] == [["a"]]


def test_unreadable_picture_leaves_its_row(tracker: RunTracker, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    tracker.table("predictions", [{"image": tmp_path / "bad.png", "said": "x"}], image="image")
    assert table(tracker, "predictions")["data"] == [["", "x"]]


def test_figures_and_texts(tracker: RunTracker) -> None:
    from matplotlib.figure import Figure

    tracker.figure("drawn", Figure(figsize=(1, 1)))
    tracker.figure("painted", Image.new("RGB", (4, 4)))
    tracker.text("notes/a.txt", "said")
    assert {p.name for p in (tracker.folder / "figures").iterdir()} == {"drawn.png", "painted.png"}
    assert (tracker.folder / "notes" / "a.txt").read_text() == "said"
