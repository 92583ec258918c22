from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import toys
from PIL import Image

from mmphi.errors import StoreError
from mmphi.pipeline.build import Pipeline
from mmphi.stages import load_settings
from mmphi.tracking.store import Store
from mmphi.tracking.uri import absolute_uri


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another folder to be in, with no run given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return tmp_path


def test_store_is_the_projects_unless_said_otherwise(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    project = Path(__file__).resolve().parents[2]
    assert absolute_uri() == f"sqlite:///{project / 'mlflow.db'}"
    (elsewhere / "mlflow.db").touch()
    assert absolute_uri() == f"sqlite:///{elsewhere / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert absolute_uri() == f"sqlite:///{elsewhere / 'other.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert absolute_uri() == "http://127.0.0.1:5000"


def test_new_store_keeps_its_artifacts_beside_it(elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("beside") / "new"
    store = Store(f"sqlite:///{folder / 'mlflow.db'}")
    tracker = store.begin("a run", {"mmphi.key": "k"}, None)
    assert tracker.folder.is_relative_to(folder / "mlruns")
    assert store.client.get_experiment("0").artifact_location.startswith((folder / "mlruns").as_uri())
    assert list(elsewhere.iterdir()) == []


def test_deleted_experiment_is_told(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(empty_store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    store.client.delete_experiment(store.experiment())
    with pytest.raises(StoreError, match="gone is deleted") as error:
        store.experiment()
    assert "restore" in error.value.hint


def test_server_that_does_not_answer_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(StoreError, match="does not answer"):
        Store(f"http://127.0.0.1:{port}")


def test_file_store_is_refused_in_words(elsewhere: Path) -> None:
    with pytest.raises(StoreError, match="cannot be used"):
        Store((elsewhere / "mlruns").as_uri())


@pytest.fixture
def server(tmp_path: Path, empty_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a tracking server that keeps artifacts where this process does not look."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", empty_store, "--artifacts-destination", str(tmp_path / "far")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *stores], env=environment, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path
        )
        try:
            deadline = time.monotonic() + 120
            while "startup complete" not in (tmp_path / "server.log").read_text():
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_remote_store(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one test, because the server takes seconds to start."""
    monkeypatch.setenv("TOY_FAIL", "stopped half way")
    settings = load_settings("tiny", {"projector.steps": "4"})
    with pytest.raises(ValueError, match="half way"):
        Pipeline(toys.TOYS).build("train", settings)
    monkeypatch.delenv("TOY_FAIL")
    first = Pipeline(toys.TOYS).build("train", settings)
    assert first.metrics["begun_at"] == 4  # Gone on from the work folder of the run that failed.
    far = [p for p in (tmp_path / "far").rglob("*") if first.run_id in p.parts]
    assert {"step-3", "manifest.json", "settings.yaml"} <= {p.name for p in far}

    shutil.rmtree(tmp_path / "cache")  # As on another machine.
    toys.CALLS.clear()
    again = Pipeline(toys.TOYS).build("train", settings)
    assert (again.run_id, toys.CALLS) == (first.run_id, [])
    assert (again.path / "step-3").read_text() == "3"
    before = (again.path / "step-3").stat().st_ino
    assert (Pipeline(toys.TOYS).build("train", settings).path / "step-3").stat().st_ino == before

    store = Store()
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    tracker = store.begin("a run", {"mmphi.key": "k"}, None)
    tracker.table("predictions", [{"image": photo, "said": "x"}], image="image")
    files = {f.path for f in store.client.list_artifacts(tracker.run_id)}
    assert files == {"predictions.json", "table_images", "figures"}
    assert store.address(tracker.run_id).startswith(f"{server}/#/experiments/")
