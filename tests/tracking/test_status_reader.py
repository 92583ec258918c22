from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import toys

from mmphi.pipeline.build import Pipeline
from mmphi.stages import load_settings
from mmphi.tracking.status_reader import ClientStatusReader, SqliteStatusReader, status_reader


def test_a_look_at_the_tables_is_what_mlflow_says(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, settings = Pipeline(toys.TOYS), load_settings("tiny", {"projector.steps": "4"})
    first = pipeline.build("train", settings)
    monkeypatch.setenv("TOY_FAIL", "no")
    failed = load_settings("tiny", {"projector.steps": "5"})
    with pytest.raises(ValueError, match="no"):
        pipeline.build("train", failed)
    quick, slow = status_reader(), ClientStatusReader()
    assert isinstance(quick, SqliteStatusReader)
    for key in (first.key, pipeline.key("draw", settings), pipeline.key("train", failed), "none"):
        assert quick.result(key) == slow.result(key)
        assert quick.run_status(key) == slow.run_status(key)
    assert quick.result(first.key).run_id == first.run_id  # type: ignore[union-attr]
    assert quick.run_status(pipeline.key("train", failed)) == "FAILED"
    assert quick.result(pipeline.key("train", failed)) is None
    for stage, preset in (("train", "tiny"), ("train", "small"), ("none", "tiny")):
        assert quick.seconds(stage, preset) == slow.seconds(stage, preset)
    assert quick.seconds("train", "tiny") is not None
    (first.path / "step-3").unlink()
    assert quick.result(first.key) is None
    pipeline.store.client.delete_run(first.run_id)
    assert quick.run_status(first.key) == ""


def test_tables_of_another_form_are_left_to_mlflow(empty_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmphi.tracking.status_reader.NEWEST", "SELECT nothing FROM nowhere WHERE ? = ? {condition}")
    assert isinstance(status_reader(), ClientStatusReader)


def test_status_needs_neither_mlflow_nor_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'none.db'}")
    code = (
        "import sys; from mmphi.cli import main; main(['status']);"
        "sys.exit(bool({'torch', 'mlflow', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "missing" in done.stdout
    assert not (tmp_path / "none.db").exists()
