from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from mmphi.errors import SettingsError, StoreError
from mmphi.pipeline import Pipeline
from mmphi.settings import Settings
from mmphi.stage import Context, Stage
from mmphi.tracking import Store, manifest_holds

calls: list[str] = []


def run_base(ctx: Context) -> Mapping[str, float]:
    calls.append("base")
    (ctx.folder / "base.txt").write_text("base")
    ctx.tracker.metrics({"train/loss": 1.0}, step=1)
    return {"base/value": 2.0}


def run_top(ctx: Context) -> Mapping[str, float]:
    calls.append("top")
    if not (ctx.folder / "half.txt").exists():
        (ctx.folder / "half.txt").write_text("half done")
        if os.environ.get("TEST_DIE"):
            Path(os.environ["TEST_DIE"]).touch()
            time.sleep(60)
        if os.environ.get("TEST_FAIL"):
            raise ValueError("it broke")
    resumed = float(os.environ.get("TEST_FAIL") is None and len(calls) == 1)
    (ctx.folder / "top.txt").write_text((ctx.upstream["base"].path / "base.txt").read_text())
    return {"top/value": 3.0, "top/resumed": resumed}


STAGES = {
    "base": Stage("base", 1, "", ("scenes",), run_base),
    "top": Stage("top", 1, "", ("projector", "data"), run_top, upstream=lambda _: ("base",)),
}


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    calls.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "TEST_DIE", "TEST_FAIL"):
        monkeypatch.delenv(name, raising=False)


def pipeline() -> Pipeline:
    return Pipeline(STAGES)


def changed(**values) -> Settings:
    settings = Settings()
    for dotted, value in values.items():
        section, _, key = dotted.partition("__")
        setattr(getattr(settings, section), key, value)
    return settings


def test_what_is_built_is_reused(capsys):
    first = pipeline().build("top", Settings())
    assert calls == ["base", "top"]
    again = pipeline().build("top", Settings())
    assert calls == ["base", "top"]
    assert (again.run_id, again.path) == (first.run_id, first.path)
    assert again.metrics["top/value"] == 3.0
    assert f"top: reusing run {first.run_id}" in capsys.readouterr().out
    assert (first.path / "top.txt").read_text() == "base"


def test_a_setting_that_matters_builds_anew_and_reuses_upstream():
    pipeline().build("top", Settings())
    pipeline().build("top", changed(projector__layers=3))
    assert calls == ["base", "top", "top"]
    pipeline().build("top", changed(scenes__test_images=7))
    assert calls == ["base", "top", "top", "base", "top"]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"projector__log_every": 3}, True),
        ({"projector__save_every": 3}, True),
        ({"embed__workers": 0}, True),
        ({"projector__learning_rate": 0.5}, False),
        ({"scenes__train_images": 9}, False),
        ({"light_clip__steps": 9}, True),  # not a section of these stages
    ],
)
def test_key(change, same):
    top = STAGES["top"]
    assert (pipeline().key(top, changed(**change)) == pipeline().key(top, Settings())) == same


def test_key_follows_version_seed_and_content_not_path(tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text("same")
    b.write_text("same")

    def reading(path: Path, version: int = 1) -> Stage:
        return Stage("s", version, "", ("data",), run_base, inputs=lambda _: {"data.split_seed": path})

    keys = [pipeline().key(reading(p), Settings()) for p in (a, b)]
    assert keys[0] == keys[1]
    b.write_text("other")
    assert pipeline().key(reading(b), Settings()) != keys[0]
    assert pipeline().key(reading(a, 2), Settings()) != keys[0]
    assert pipeline().key(reading(a), Settings(seed=1)) != keys[0]
    with pytest.raises(SettingsError, match="no such file"):
        pipeline().key(reading(tmp_path / "none"), Settings())


def test_force_and_no_build():
    with pytest.raises(StoreError, match="base is not built"):
        pipeline().build("top", Settings(), no_build=True)
    assert calls == []
    first = pipeline().build("top", Settings())
    forced = pipeline().build("top", Settings(), force=True)
    assert calls == ["base", "top", "top"]
    assert forced.run_id != first.run_id
    assert pipeline().build("top", Settings(), no_build=True).run_id == forced.run_id


def test_damaged_results_are_built_again():
    first = pipeline().build("top", Settings())
    assert manifest_holds(first.path)
    (first.path / "top.txt").write_text("bass")
    assert pipeline().build("top", Settings()).run_id != first.run_id
    assert calls == ["base", "top", "top"]


def test_failed_run_is_no_result_and_its_files_are_taken_over(monkeypatch):
    monkeypatch.setenv("TEST_FAIL", "1")
    with pytest.raises(ValueError, match="it broke"):
        pipeline().build("top", Settings())
    store = Store()
    (failed,) = store._search("attributes.status = 'FAILED'")
    assert failed.data.tags["mmphi.error"] == "ValueError: it broke"
    monkeypatch.delenv("TEST_FAIL")
    done = pipeline().build("top", Settings())
    assert (done.path / "half.txt").read_text() == "half done"
    assert store.client.get_run(failed.info.run_id).data.tags["mmphi.continued_by"] == done.run_id
    assert store.client.get_run(done.run_id).data.tags["mmphi.continues"] == failed.info.run_id


def test_killed_outright_is_no_result_and_is_continued(tmp_path):
    """kill -9 in the middle of a stage, in another process."""
    script = tmp_path / "victim.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from test_pipeline import *\npipeline().build('top', Settings())\n"
    )
    flag = tmp_path / "asleep"
    victim = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "TEST_DIE": str(flag)})
    deadline = time.monotonic() + 60
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(StoreError, match="is building the same result right now"):
        pipeline().build("top", Settings())
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert pipeline().result("top", Settings()) is None
    calls.clear()
    done = pipeline().build("top", Settings())
    assert calls == ["top"]
    assert done.metrics["top/resumed"] == 1.0
    statuses = {r.info.status for r in Store()._search("tags.`mmphi.stage` = 'top'")}
    assert statuses <= {"KILLED", "FINISHED", "FAILED"}


def test_lineage_is_recorded():
    done = pipeline().build("top", Settings(name="mine"), label="layers=2")
    run = Store().client.get_run(done.run_id)
    tags = run.data.tags
    base = pipeline().result("base", Settings())
    assert tags["mmphi.upstream.base"] == base.run_id
    assert tags["mmphi.stage"] == "top"
    assert tags["mmphi.key"] == done.key
    assert {"mmphi.git_commit", "mmphi.git_dirty", "mmphi.cpu", "mmphi.cores", "mmphi.memory_gb"} <= tags.keys()
    assert run.info.run_name == "top mine layers=2"
    assert run.data.params["projector.layers"] == "2"
    assert run.data.params["data.sources"] == "[]"
    files = {f.path for f in Store().client.list_artifacts(done.run_id)}
    assert {"settings.yaml", "packages.txt", "manifest.json"} <= files
    listed = json.loads((done.path / "manifest.json").read_text())
    assert listed["top.txt"][0] == 4


def test_inside_the_run_that_mlflow_began(monkeypatch):
    store = Store()
    experiment = store.client.create_experiment("elsewhere")
    given = store.client.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    done = pipeline().build("top", Settings())
    assert done.run_id == given
    base = Store().client.get_run(store.client.get_run(given).data.tags["mmphi.upstream.base"])
    assert base.info.run_id != given
    assert base.info.experiment_id == experiment
    second = store.client.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", second)
    assert pipeline().build("top", Settings()).run_id == given
    assert store.client.get_run(second).data.tags["mmphi.reused"] == given
    store.client.set_terminated(second, "FINISHED")
    monkeypatch.delenv("MLFLOW_RUN_ID")
    assert pipeline().build("top", Settings()).run_id == given


def test_relative_store_is_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    monkeypatch.chdir(tmp_path)
    assert Store().uri == f"sqlite:///{tmp_path}/here.db"
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/here.db"


def test_torchrun_asks_for_what_is_upstream(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StoreError, match="torchrun trains one stage"):
        pipeline().build("top", Settings())


def test_tables_with_pictures(tmp_path):
    from PIL import Image

    path = tmp_path / "a.png"
    Image.new("RGB", (600, 300), "red").save(path)
    tracker = Store().start("x", {"mmphi.key": "k"}, continue_given=False)
    for step in (1, 2):
        tracker.table("predictions", [{"step": step, "image": path, "said": "red"}], image="image")
    table = json.loads((tracker.folder / "predictions.json").read_text())
    assert [row[0] for row in table["data"]] == [1, 2]
    assert "image" in json.dumps(table["data"][0])
    tracker.table("plain", [{"a": 1, "b": "x"}])
    assert (tracker.folder / "plain.csv").read_text() == "a,b\n1,x\n"
