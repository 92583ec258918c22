"""A study of real trainings at small sizes, from the command line to MLflow's pages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from small import SMALL

from ablations import study_cli
from ablations.run import run
from ablations.study import Study
from mmphi.cli import main
from mmphi.pipeline.build import Pipeline
from mmphi.stages import STAGES
from mmphi.tracking.run_writer import TrackingStore
from reports.study_query import StudyData, Trial, load_study

FIXED = {name: value for name, value in SMALL.items() if name != "projector.steps"} | {"projector.optimizer": "adamw"}
STUDY = Study(
    question="Do two layers do better than one?",
    factor="projector.layers",
    levels={"one": 1, "two": 2},
    baseline="one",
    nuisance={"projector.learning_rate": [1e-3, 1e-2]},
    tuning_seeds=(1000,),
    tuning_extensions=0,
    fixed=FIXED,
    tokens=600,
    seeds=2,
)


@pytest.mark.slow
def test_study_of_real_trainings(empty_store: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("depth", STUDY, workers=1) == 0
    assert "finished: mmphi report ablation --study depth" in capfd.readouterr().out
    store = TrackingStore()
    data = load_study(store, "depth", ["val/loss"])
    assert data.missing() == []
    assert data.status == "FINISHED"
    trials = data.results()
    one, two = trials["one"][1], trials["two"][1]
    # All that a report asks for is there.
    for trial in (one, two):
        assert trial.metrics["projector/supervised_tokens"] >= 600
        assert trial.metrics["cost/first_token_s"] > 0
        assert trial.metrics["projector/feature_bytes_per_image"] > 0
        assert trial.metrics["train/memory_gb"] > 0
        assert trial.tags["mmphi.upstream.embed"]
    assert one.metrics["projector/supervised_tokens"] == two.metrics["projector/supervised_tokens"]
    assert two.metrics["projector/parameters"] > one.metrics["projector/parameters"]
    # The test split is for the verdict alone.
    tuning = [t for t in data.trials if t.phase == "tuning"]
    assert len(tuning) == 4
    assert all("test/loss" not in t.metrics and "val/loss" in t.metrics for t in tuning)
    # A worker keeps models and data from trial to trial, and leaves nothing in them: the same training alone in a
    # fresh process ends the same.
    nuisance = {"projector.learning_rate": float(two.params["projector.learning_rate"])}
    alone = Pipeline(STAGES).build("projector", STUDY.settings("two", 1, nuisance), force=True)
    assert alone.run_id != two.run_id
    assert alone.metrics["test/loss"] == two.metrics["test/loss"]
    # From the command line.
    assert main(["studies"]) == 0
    assert "depth                  all verdict trials are done, 4 tuning trials done" in capfd.readouterr().out
    assert main(["studies", "depth", "--watch"]) == 0
    shown = capfd.readouterr().out
    assert "one (baseline)  2/2" in shown
    assert main(["compare", "depth", "--no-browser"]) == 0
    pages = dict(line.split("http", 1) for line in capfd.readouterr().out.splitlines())
    address = unquote(pages["side by side        "])
    ids = json.loads(address.partition("runs=")[2].partition("&")[0])
    assert set(ids) == {t.run_id for of in trials.values() for t in of.values()}
    assert "mmphi.study` = 'depth'" in unquote(pages["charts              "])
    assert main(["report", "ablation", "--study", "depth", "--out", str(tmp_path)]) == 0
    assert "with 2 seeds" in (tmp_path / "report.md").read_text()
    # A study resumed as something else is refused by the command too.
    with pytest.raises(Exception, match=r"fixed.projector.batch_size is 16, was 8"):
        run("depth", replace(STUDY, fixed={**FIXED, "projector.batch_size": "16"}), workers=1)


@pytest.mark.slow
def test_charts_hold_no_tuning(empty_store: str) -> None:
    pages = study_cli.compare_urls(load_data(), "http://127.0.0.1:5000")
    assert set(pages) == {"side by side", "curves", "table", "charts"}
    assert "'tuning'" in unquote(pages["table"])


def load_data() -> StudyData:
    trials = [Trial("a", "verdict", "one", 0, "FINISHED"), Trial("b", "tuning", "one", 0, "FINISHED")]
    return StudyData("depth", "r", "1", {"levels": {"one": 1}, "metric": "test/loss"}, trials=trials)
