from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
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
from mmphi.tracking.lease import HEARTBEAT
from mmphi.tracking.run_writer import TrackingStore
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
    store = TrackingStore(f"sqlite:///{folder / 'mlflow.db'}")
    tracker = store.begin("a run", {"mmphi.key": "k"})
    assert tracker.folder.is_relative_to(folder / "mlruns")
    assert store.client.get_experiment("0").artifact_location.startswith((folder / "mlruns").as_uri())
    assert list(elsewhere.iterdir()) == []


def test_deleted_experiment_is_told(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TrackingStore(empty_store)
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
        TrackingStore(f"http://127.0.0.1:{port}")


def test_file_store_is_refused_in_words(elsewhere: Path) -> None:
    with pytest.raises(StoreError, match="cannot be used"):
        TrackingStore((elsewhere / "mlruns").as_uri())


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


@pytest.mark.slow
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

    store = TrackingStore()
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    tracker = store.begin("a run", {"mmphi.key": "k"})
    tracker.table("predictions", [{"image": photo, "said": "x"}], image="image")
    files = {f.path for f in store.client.list_artifacts(tracker.run_id)}
    assert files == {"predictions.json", "table_images", "figures"}
    assert store.address(tracker.run_id).startswith(f"{server}/#/experiments/")


def test_queries_page_past_a_thousand_runs(empty_store: str) -> None:
    store = TrackingStore(empty_store)
    add_runs(empty_store, store.experiment(), 1300)
    assert len(list(store.search(stage="projector"))) == 1300
    newest = store.newest("projector")
    assert newest is not None
    assert newest.data.tags["mmphi.key"] == "1299"
    assert [run.data.tags["mmphi.key"] for run in store.search("FINISHED", key="7")] == ["7"]


def add_runs(uri: str, experiment: str, count: int) -> None:
    """Finished runs straight into the database: through the client they would take minutes."""
    columns = "run_uuid, name, user_id, source_type, status, start_time, end_time"
    columns += ", lifecycle_stage, experiment_id, artifact_uri"
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        for i in range(count):
            values = (
                f"{i:032x}",
                f"projector {i}",
                "somebody",
                "LOCAL",
                "FINISHED",
                i,
                i + 1,
                "active",
                experiment,
                f"/none/{i}",
            )
            connection.execute(f"INSERT INTO runs ({columns}) VALUES ({','.join('?' * len(values))})", values)
            tags = [("mmphi.stage", "projector", f"{i:032x}"), ("mmphi.key", str(i), f"{i:032x}")]
            connection.executemany("INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)", tags)


LEASE_S = 6


def heartbeat(host: str) -> float:
    """When a host's run was last known to be alive, in seconds."""
    (run,) = [run for run in TrackingStore().search(stage="train") if run.data.tags["mmphi.host"] == host]
    return float(run.data.tags[HEARTBEAT])


def toy_at(host: str, cache: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A toy stage built on another host: with a name and a cache folder of its own."""
    own = {"MMPHI_HOST": host, "XDG_CACHE_HOME": str(cache / host), "MMPHI_LEASE_S": str(LEASE_S)}
    return toys.begin(*arguments, **own, **environment)


@pytest.mark.slow
def test_live_run_of_another_host_is_waited_for_and_a_dead_one_taken_over(server: str, tmp_path: Path) -> None:
    """Two hosts that share nothing but the server: each has a name and a cache folder of its own."""
    go = tmp_path / "go"
    first = toy_at("one", tmp_path, "train", TOY_HOLD=str(go), TOY_SHARE="1")
    toys.until(first, "held")
    second = toy_at("two", tmp_path, "train")
    output = toys.until(second, "waiting for it")
    assert f"process {first.pid} on one" in output
    begun = heartbeat("one")
    while heartbeat("one") - begun < 1.5 * LEASE_S:  # The heartbeat keeps it for longer than one lease.
        time.sleep(0.2)
    assert second.poll() is None
    first.kill()
    first.wait()
    output += second.communicate(timeout=60)[0]
    assert "resuming from what run" in output
    ended = json.loads(output.splitlines()[-1])
    assert ended["metrics"]["begun_at"] == 3  # What the first had shared of its work.
    runs = {run.data.tags["mmphi.host"]: run for run in TrackingStore().search(stage="train")}
    assert runs["one"].info.status == "KILLED"
    assert runs["one"].data.tags["mmphi.continued_by"] == runs["two"].info.run_id
    assert runs["two"].info.status == "FINISHED"


@pytest.mark.slow
def test_live_run_of_another_host_is_reused_when_it_ends(server: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    first = toy_at("one", tmp_path, "train", TOY_HOLD=str(go))
    toys.until(first, "held")
    second = toy_at("two", tmp_path, "train")
    toys.until(second, "waiting for it")
    go.touch()
    results = [json.loads(process.communicate(timeout=60)[0].splitlines()[-1]) for process in (first, second)]
    assert results[0]["run_id"] == results[1]["run_id"]
    assert results[0]["path"] != results[1]["path"]
    assert len(list(TrackingStore().search(stage="train"))) == 1


@pytest.mark.slow
def test_run_begun_for_a_cached_result_points_at_it(server: str) -> None:
    """As `mlflow run` on a remote store does the second time."""
    settings = load_settings("tiny", {"projector.steps": "4"})
    first = Pipeline(toys.TOYS).build("train", settings)
    store = TrackingStore()
    run = store.client.create_run("0", run_name="mine").info.run_id
    assert Pipeline(toys.TOYS).build("train", settings, run=run).run_id == first.run_id
    assert store.run(run).data.tags["mmphi.reuses"] == first.run_id


@pytest.mark.slow
def test_artifacts_are_fetched_by_one_process_at_a_time(server: str, tmp_path: Path) -> None:
    settings = load_settings("tiny", {"projector.steps": "4"})
    first = Pipeline(toys.TOYS).build("train", settings)
    shutil.rmtree(tmp_path / "cache")
    code = (
        "import sys; from mmphi.tracking.run_writer import TrackingStore\n"
        "store = TrackingStore(); print(store.fetch(store.run(sys.argv[1])))"
    )
    fetching = [
        subprocess.Popen([sys.executable, "-c", code, first.run_id], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    folders = {process.communicate()[0].strip() for process in fetching}
    assert [process.returncode for process in fetching] == [0, 0, 0]
    (folder,) = folders
    assert (Path(folder) / "step-3").read_text() == "3"
    assert not list(Path(folder).parent.glob("*.part"))


@pytest.mark.slow
def test_shared_checkpoint_replaces_the_one_before(server: str, tmp_path: Path) -> None:
    store = TrackingStore()
    tracker = store.begin("a run", {"mmphi.key": "k"})
    for step in (2, 4):
        checkpoint = tracker.folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "weights").write_text(str(step))
        tracker.checkpoint(checkpoint)
    assert {f.path for f in store.client.list_artifacts(tracker.run_id)} == {"checkpoint-4"}


def test_a_host_that_waits_is_not_taken_over(empty_store: str) -> None:
    store = TrackingStore(empty_store)
    tags = {"mmphi.key": "k", "mmphi.stage": "draw"}
    runs = {name: store.begin(name, tags) for name in ("waits", "silent", "same machine, killed", "builds")}
    now = {"waits": time.time(), "silent": time.time() - 3600, "same machine, killed": time.time()}
    for name, at in now.items():
        domain = store._domain() if name.startswith("same") else "another machine"
        runs[name].tags({HEARTBEAT: f"{at:.3f}", "mmphi.lock_domain": domain, "mmphi.lease": "waiting"})
    store.adopt(runs["builds"], "k")
    found = {name: store.run(tracker.run_id) for name, tracker in runs.items()}
    assert {name: run.info.status for name, run in found.items()} == {
        "waits": "RUNNING",
        "silent": "KILLED",
        "same machine, killed": "KILLED",
        "builds": "RUNNING",
    }
    taken = {name for name, run in found.items() if "mmphi.continued_by" in run.data.tags}
    assert taken == {"silent", "same machine, killed"}
    store.finish(runs["waits"])  # It may do its own work, when its turn comes.
