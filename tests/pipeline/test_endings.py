"""How stages end that do not finish: killed, interrupted, failed, damaged, on a full disk; and what follows."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toys
from mlflow.exceptions import MlflowException

from mmphi.errors import StoreError
from mmphi.pipeline.build import Pipeline
from mmphi.pipeline.stage import Context
from mmphi.stages import Settings, load_settings
from mmphi.tracking.run_writer import TrackingStore


@pytest.fixture
def store(empty_store: str) -> TrackingStore:
    toys.CALLS.clear()
    return TrackingStore(empty_store)


@pytest.fixture
def pipeline(store: TrackingStore) -> Pipeline:
    return Pipeline(toys.TOYS, store)


def settings(**overrides: str) -> Settings:
    return load_settings("tiny", {"projector.steps": "4", **{k.replace("__", "."): v for k, v in overrides.items()}})


@pytest.mark.parametrize("damage", ["deleted", "shorter", "edited", "no manifest"])
def test_damaged_result_is_not_one(pipeline: Pipeline, damage: str) -> None:
    first = pipeline.build("train", settings())
    file = first.path / "step-3"
    match damage:
        case "deleted":
            file.unlink()
        case "shorter":
            file.write_text("")
        case "edited":
            file.write_text("9")
        case "no manifest":
            (first.path / "manifest.json").unlink()
    again = pipeline.build("train", settings())
    assert again.run_id != first.run_id
    assert (again.path / "step-3").read_text() == "3" or damage == "no manifest"


def test_copied_result_still_holds(pipeline: Pipeline) -> None:
    first = pipeline.build("train", settings())
    for file in first.path.rglob("*"):
        os.utime(file, (1, 1))
    assert pipeline.build("train", settings()).run_id == first.run_id


def test_failure_is_recorded_and_not_reused(
    pipeline: Pipeline, store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_FAIL", "the loss is nan")
    with pytest.raises(ValueError, match="nan"):
        pipeline.build("train", settings())
    failed = next(store.search(stage="train"))
    assert failed.info.status == "FAILED"
    assert failed.data.tags["mmphi.error"] == "ValueError: the loss is nan"
    monkeypatch.delenv("TOY_FAIL")
    result = pipeline.build("train", settings())
    assert result.metrics["begun_at"] == 4
    assert store.client.get_run(failed.info.run_id).data.tags["mmphi.continued_by"] == result.run_id
    assert store.client.get_run(result.run_id).data.tags["mmphi.continues"] == failed.info.run_id


def test_full_disk_is_told(store: TrackingStore) -> None:
    def full(_: Context) -> Mapping[str, float]:
        raise OSError(errno.ENOSPC, "No space left on device")

    stages = {"draw": replace(toys.TOYS["draw"], run=full)}
    with pytest.raises(StoreError, match="full") as error:
        Pipeline(stages, store).build("draw", settings())
    assert "make room" in error.value.hint


@pytest.mark.slow
def test_killed_run_is_gone_on_from_and_never_taken_for_a_result(
    pipeline: Pipeline, store: TrackingStore, tmp_path: Path
) -> None:
    process = toys.begin("train", TOY_HOLD=str(tmp_path / "never"))
    toys.until(process, "held")
    process.kill()
    process.wait()
    dead = next(store.search(stage="train"))
    assert dead.info.status == "RUNNING"
    assert pipeline.result("train", settings()) is None
    # `mlflow run` may say FINISHED of a run whose command ended in whatever way.
    store.client.set_terminated(dead.info.run_id, "FINISHED")
    assert pipeline.result("train", settings()) is None
    store.client.update_run(dead.info.run_id, status="RUNNING")
    result = pipeline.build("train", settings())
    assert result.metrics["begun_at"] == 3
    assert sorted(p.name for p in result.path.glob("step-*")) == [f"step-{i}" for i in range(4)]
    dead = store.client.get_run(dead.info.run_id)
    assert dead.info.status == "KILLED"
    assert dead.data.tags["mmphi.continued_by"] == result.run_id
    assert pipeline.build("train", settings()).run_id == result.run_id


@pytest.mark.slow
def test_force_does_not_go_on_from_a_dead_run(pipeline: Pipeline, tmp_path: Path) -> None:
    process = toys.begin("train", TOY_HOLD=str(tmp_path / "never"))
    toys.until(process, "held")
    process.kill()
    process.wait()
    assert pipeline.build("train", settings(), force=True).metrics["begun_at"] == 0


@pytest.mark.slow
def test_interrupted_run_is_killed_and_gone_on_from(pipeline: Pipeline, store: TrackingStore, tmp_path: Path) -> None:
    process = toys.begin("train", TOY_HOLD=str(tmp_path / "never"))
    toys.until(process, "held")
    process.send_signal(signal.SIGINT)
    process.wait()
    assert next(store.search(stage="train")).info.status == "KILLED"
    assert pipeline.build("train", settings()).metrics["begun_at"] == 3


@pytest.mark.slow
def test_second_process_waits_and_reuses(store: TrackingStore, tmp_path: Path) -> None:
    go = tmp_path / "go"
    first = toys.begin("train", TOY_HOLD=str(go))
    toys.until(first, "held")
    second = toys.begin("train")
    said = toys.until(second, "waiting for it")
    assert f"process {first.pid}" in said
    go.touch()
    results = [json.loads(process.communicate()[0].splitlines()[-1]) for process in (first, second)]
    assert results[0] == results[1]
    assert len(list(store.search(stage="train"))) == 1


def raised(cause: Exception) -> Exception:
    """An error that another one was made of, as libraries do."""
    try:
        try:
            raise cause
        except Exception as inner:
            raise RuntimeError("it did not work") from inner
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/2"),
        raised(OSError("(sqlite3.OperationalError) database or disk is full")),
    ],
    ids=["file", "optimiser", "sqlite"],
)
def test_full_disk_is_told_whoever_meets_it(store: TrackingStore, error: Exception) -> None:
    def full(_: Context) -> Mapping[str, float]:
        raise error

    with pytest.raises(StoreError, match=r"is full: .* MB are free") as caught:
        Pipeline({"draw": replace(toys.TOYS["draw"], run=full)}, store).build("draw", settings())
    assert "make room" in caught.value.hint


def test_full_disk_of_the_database_is_told(store: TrackingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MlflowException("(sqlite3.OperationalError) database or disk is full")

    monkeypatch.setattr(store.client, "create_run", full)
    with pytest.raises(StoreError, match="is full"):
        Pipeline(toys.TOYS, store).build("draw", settings())


def test_run_killed_before_it_left_a_file_has_a_successor(pipeline: Pipeline, store: TrackingStore) -> None:
    """It is not listed among the failed ones of a study then."""
    key = pipeline.key("train", settings())
    dead = store.begin("train", {"mmphi.stage": "train", "mmphi.key": key})
    result = pipeline.build("train", settings())
    tags = store.run(dead.run_id).data.tags
    assert tags["mmphi.continued_by"] == result.run_id
    assert "mmphi.continues" not in store.run(result.run_id).data.tags
