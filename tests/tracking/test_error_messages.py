"""Stores that cannot be used, each as MLflow, SQLAlchemy and SQLite really fail."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

import pytest
import toys

from mmphi.cli import main
from mmphi.errors import StoreError
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.stage import Stage
from mmphi.stages import load_settings
from mmphi.tracking.error_messages import store_error
from mmphi.tracking.run_writer import TrackingStore
from mmphi.tracking.uri import database


def explained(error: BaseException) -> StoreError:
    found = store_error(error)
    assert found is not None, repr(error)
    return found


def test_errors_of_other_things_are_not_explained() -> None:
    assert store_error(ValueError("database is locked")) is None
    with pytest.raises(KeyError) as raised:  # noqa: PT012
        try:
            raise sqlite3.OperationalError("database is locked")
        except sqlite3.Error:
            raise KeyError("a mistake of ours")  # noqa: B904 - that is what is tested.
    assert store_error(raised.value) is None


def test_a_file_that_is_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database at all, but a text" * 100)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(StoreError, match=f"{uri} is no SQLite database") as error:
        TrackingStore(uri)
    assert "restore a copy" in error.value.hint
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main(["status"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {uri} is no SQLite database")
    assert "Traceback" not in printed


def test_a_locked_database_is_waited_for_and_then_told(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = database(empty_store)
    assert file is not None
    monkeypatch.setenv("MMPHI_BUSY_S", "0.3")
    store = TrackingStore(empty_store)
    run_id = store.begin("a run", {}).run_id
    with sqlite3.connect(file, isolation_level=None, check_same_thread=False) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Exception, match="locked") as error:
            TrackingStore(empty_store).client.set_tag(run_id, "x", "1")
        assert "is locked by another process" in explained(error.value).what
        monkeypatch.setenv("MMPHI_BUSY_S", "60")
        threading.Timer(0.5, lambda: other.execute("COMMIT")).start()
        TrackingStore(empty_store).client.set_tag(run_id, "x", "2")
    assert store.run(run_id).data.tags["x"] == "2"


def test_a_run_that_is_deleted_while_it_trains(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def deletes(ctx):
        TrackingStore(empty_store).client.delete_run(ctx.tracker.run_id)
        ctx.tracker.metrics({"train/loss": 1.0}, 1)
        ctx.tracker.flush()
        return {}

    stages = {**toys.TOYS, "draw": Stage("draw", 1, "deletes its run", ("scenes",), deletes)}
    with pytest.raises(Exception) as error:  # noqa: PT011 - whatever MLflow raises.
        Pipeline(stages, TrackingStore(empty_store)).build("draw", load_settings("tiny"))
    found = explained(error.value)
    assert "was deleted while it was needed" in found.what
    assert "mlflow runs restore --run-id" in found.hint


def test_an_experiment_that_is_not_there(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "4711")
    with pytest.raises(Exception) as error:  # noqa: PT011 - whatever MLflow raises.
        Pipeline(toys.TOYS, TrackingStore(empty_store)).build("draw", load_settings("tiny"))
    found = explained(error.value)
    assert "the experiment is not in" in found.what
    assert "MLFLOW_EXPERIMENT_ID" in found.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_store_that_cannot_be_written(empty_store: str) -> None:
    file = database(empty_store)
    assert file is not None
    store = TrackingStore(empty_store)
    file.chmod(0o444)
    with pytest.raises(Exception) as error:  # noqa: PT011 - whatever MLflow raises.
        store.begin("a run", {})
    assert "cannot be written" in explained(error.value).what


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("attempt to write a readonly database", "cannot be written"),
        ("unable to open database file", "cannot be opened"),
        ("database or disk is full", "disk of the database"),
        ("database disk image is malformed", "is no SQLite database, or is damaged"),
    ],
)
def test_what_sqlite_says(raised: str, message: str) -> None:
    assert message in explained(sqlite3.OperationalError(raised)).what


def test_a_password_is_not_repeated() -> None:
    found = store_error(sqlite3.OperationalError("database is locked"), "postgresql://me:secret@host/db")
    assert found is not None
    assert "secret" not in str(found)
