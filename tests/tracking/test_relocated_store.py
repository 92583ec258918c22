"""A store that was moved, and one that was copied while the first one stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import toys

from mmphi.pipeline.build import Pipeline
from mmphi.stages import load_settings
from mmphi.tracking.relocated_store import relocate
from mmphi.tracking.run_writer import TrackingStore


def built(folder: Path) -> TrackingStore:
    """A store with a finished training."""
    store = TrackingStore(f"sqlite:///{folder / 'mlflow.db'}")
    Pipeline(toys.TOYS, store).build("train", load_settings("tiny", {"projector.steps": "4"}))
    return store


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "home").mkdir()
    built(tmp_path / "home")
    toys.CALLS.clear()
    return tmp_path / "home"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stays", [False, True])
def test_it_is_gone_on_with_where_it_is_now(home: Path, stays: bool, capsys: pytest.CaptureFixture[str]) -> None:
    away = home.parent / "a new place" / "project"
    shutil.copytree(home, away)
    before = files(home)
    if not stays:
        shutil.rmtree(home)
    again = built(away)
    assert toys.CALLS == []  # Nothing is built again.
    assert f"was in {home / 'mlruns'} before" in capsys.readouterr().err
    result = Pipeline(toys.TOYS, again).build("train", load_settings("tiny", {"projector.steps": "5"}))
    assert result.path.is_relative_to(away)
    assert again.client.get_run(result.run_id).info.artifact_uri.startswith((away / "mlruns").as_uri())
    assert {path.name for path in (away / "mlruns").rglob("step-4")} == {"step-4"}
    # Nothing is written to the old place.
    assert (files(home) == before) if stays else not home.exists()
    assert relocate(away / "mlflow.db") == []


def test_artifacts_that_are_elsewhere_on_purpose_stay_there(home: Path) -> None:
    shutil.copyfile(home / "mlflow.db", home.parent / "mlflow.db")  # The database alone.
    assert relocate(home.parent / "mlflow.db") == []
    assert relocate(home.parent / "none.db") == []
    (home.parent / "text.db").write_text("no database")
    assert relocate(home.parent / "text.db") == []
