from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from PIL import Image
from synthetic import read, record, study, trial, values

from mmphi.errors import SettingsError, StoreError
from mmphi.tracking.run_writer import TrackingStore
from reports.ablation_text import design
from reports.commands import report
from reports.comparison import compare
from reports.figures import front
from reports.study_query import StudyData, Trial, load_study, study_names
from reports.verdict import JudgedMetric, headline, quote_name

EFFECTS = {"2 layers": 0.0, "3 layers": -0.05, "odd | one": -0.001}


def write(name: str, folder: Path, *arguments: str) -> str:
    assert report(["ablation", "--study", name, "--out", str(folder), *arguments]) == 0
    return read(folder)


def test_verdict_first_then_what_it_stands_on(
    empty_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = study("depth", EFFECTS)
    text = write("depth", tmp_path / "out")
    verdict = text.index("**3 layers beat 2 layers by 0.0")
    assert verdict < text.index("## Levels") < text.index("## Every seed") < text.index("## What it costs")
    assert "odd | one equalled it within 0.02 nats/token" in text
    assert "8 paired seeds" in text
    assert "**Not varied**" in text
    assert "Budgets are equal: 1,000 supervised tokens per trial" in text
    assert "None: every trial begun has a result." in text
    assert "mmphi ablate depth --seeds 8 --tokens 1000" in text
    assert capsys.readouterr().out.startswith("3 layers beat 2 layers by 0.0")
    # Links lead to the runs; what would end a cell of a table is escaped.
    run = load_study(TrackingStore(), "depth").results()["3 layers"][4].run_id
    assert f"/runs/{run})" in text
    assert "| odd \\| one |" in text
    # Every table is a csv too, and every figure a picture of 800 px.
    with (tmp_path / "out" / "levels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["projector.layers"] for row in rows] == ["2 layers", "3 layers", "odd | one"]
    mean = sum(found["3 layers"].values()) / 8
    assert float(rows[1]["mean test/loss"]) == pytest.approx(mean, abs=1e-4)
    assert {row["n"] for row in rows} == {"8"}
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert set(pictures) == {"effects.png", "seeds.png", "curves.png", "tradeoffs.png", "importance.png"}
    for picture in pictures:
        with Image.open(tmp_path / "out" / picture) as image:
            assert image.width == 800
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "<td>odd | one</td>" in page
    assert 'src="http' not in page
    # It is logged beside the study's declaration.
    data = load_study(TrackingStore(), "depth")
    logged = {f.path for f in TrackingStore().client.list_artifacts(data.run_id, "report")}
    assert {"report/report.md", "report/report.html", "report/levels.csv"} <= logged


def test_same_store_same_bytes(empty_store: str, tmp_path: Path) -> None:
    study("depth", EFFECTS)
    for folder in ("one", "two"):
        write("depth", tmp_path / folder, "--no-log")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("one", "two"))
    assert one == two
    assert len(one) > 8


def test_a_later_evaluation_changes_nothing(empty_store: str) -> None:
    """Another study, or a person, measures the same model with other settings, and its run shows that."""
    store = TrackingStore()
    record("judged", seeds=2)
    evaluations = [trial("none", "", seed, {"test/loss": 1.0 + seed}) for seed in range(2)]
    trials = [
        trial("judged", "2 layers", seed, {"test/loss": 9.0, "val/loss": 0.5}, tags={"mmphi.judged_by": evaluation})
        for seed, evaluation in enumerate(evaluations)
    ]
    store.client.set_tag(trials[0], "mmphi.not_finite", "test/loss = nan at step 0")  # Of the later evaluation.
    data = load_study(store, "judged")
    assert data.values("test/loss")["2 layers"] == {0: 1.0, 1: 2.0}
    assert data.results()["2 layers"][0].metrics["val/loss"] == 0.5
    assert data.failed() == []
    store.client.set_tag(evaluations[0], "mmphi.not_finite", "test/loss = nan at step 0")
    store.client.delete_run(evaluations[1])
    data = load_study(store, "judged")
    assert data.values("test/loss")["2 layers"] == {}
    assert [trial.reason for trial in data.failed()] == ["test/loss = nan at step 0"]
    assert "was deleted" in data.trials[1].reason


def test_missing_failed_doubled_and_stopped_are_told(empty_store: str, tmp_path: Path) -> None:
    run_id = record("gaps", seeds=3)
    for seed in range(3):
        trial("gaps", "2 layers", seed, {"test/loss": 1.0 + seed / 10, "projector/supervised_tokens": 1000.0})
    trial(
        "gaps",
        "3 layers",
        0,
        {"test/loss": 0.9, "projector/supervised_tokens": 500.0},
        tags={"mmphi.git_commit": "f" * 16},
    )
    trial("gaps", "3 layers", 0, {"test/loss": 0.2}, started=99)
    trial("gaps", "3 layers", 1, {}, status="FAILED", tags={"mmphi.error": "TrainingError: the loss at step 3 is nan"})
    trial("gaps", "3 layers", 2, {}, status="KILLED", tags={"mmphi.continued_by": "another"})
    change = '{"what": "stop", "name": "odd | one", "value": null, "at": "2026-11-25 01:00:00"}'
    TrackingStore().client.set_tag(run_id, "mmphi.change.0000", change)
    text = write("gaps", tmp_path)
    assert "2 trials that were asked for have no result: 3 layers seed 1 and 3 layers seed 2" in text
    assert "3 layers failed at 2 of 3 seeds" in text
    assert "1 cells have more than one finished run; the oldest counts: 3 layers seed 0" in text
    assert "Stopped before their last seed: odd | one" in text
    assert "2 commits of the code" in text
    assert "**Budgets differ**: from 500 to 1,000" in text
    assert "1 runs ended without a result. 1 interrupted runs were resumed" in text
    assert "| verdict | 3 layers | 1 | FAILED | TrainingError: the loss at step 3 is nan |" in text
    assert "| 2026-11-25 01:00:00 | stop | odd \\| one | - |" in text
    assert "No statement is possible about odd | one" in text
    data = load_study(TrackingStore(), "gaps")
    assert data.values("test/loss")["3 layers"] == {0: 0.9}


@pytest.mark.slow
def test_tuning_is_shown_and_its_edges(empty_store: str, tmp_path: Path) -> None:
    record("tuned", seeds=2, nuisance={"projector.learning_rate": [0.001, 0.003, 0.01]})
    for level, best in (("2 layers", 0.003), ("3 layers", 0.01)):
        for seed in range(2):
            trial("tuned", level, seed, {"test/loss": 1.0 + seed}, params={"projector.learning_rate": best})
        for rate in (0.001, 0.003, 0.01):
            params = {"projector.learning_rate": rate}
            reached = {"val/loss": 1.0 + abs(rate - best)}
            trial("tuned", level, 1000, reached, phase="tuning", params=params)
    text = write("tuned", tmp_path)
    assert "| 2 layers | 0.003 | 0.001: 1.002; 0.003: 1; 0.01: 1.007 |" in text
    assert "3 layers, `projector.learning_rate` = 0.01: the best value is at the edge" in text
    assert "2 layers, `projector" not in text


def test_bad_stores(empty_store: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"has no study 'depth'\n  mmphi ablate depth"):
        write("depth", tmp_path)
    record("depth")
    with pytest.raises(StoreError, match="no trial of the study depth is finished"):
        write("depth", tmp_path)
    trial("depth", "2 layers", 0, {"test/cider": 0.3, "val/loss": 1.0})
    with pytest.raises(StoreError, match=r"has the metric test/loss\n  they have test/cider, val/loss"):
        write("depth", tmp_path)
    with pytest.raises(SettingsError, match=r"did you mean depth\?"):
        write("deptj", tmp_path)
    record("other")
    assert study_names(TrackingStore()) == ["depth", "other"]


def test_one_seed_is_no_verdict(empty_store: str, tmp_path: Path) -> None:
    study("one", {"2 layers": 0.0, "3 layers": -0.5}, seeds=1, levels={"2 layers": 2, "3 layers": 3})
    text = write("one", tmp_path)
    assert "**No difference can be shown between 3 layers and 2 layers** with 1 seed" in text
    assert "no interval: one seed" in text


def test_front_is_who_is_beaten_by_nobody() -> None:
    points = {"small": (1.0, 3.0), "middle": (2.0, 2.0), "worse": (2.5, 2.5), "large": (4.0, 1.0), "twin": (4.0, 1.0)}
    assert front(points, less=True) == ["small", "middle", "large", "twin"]
    assert front({"a": (1.0, 1.0), "b": (2.0, 0.5)}, less=False) == ["a"]


@pytest.mark.parametrize(
    ("stage", "upstream", "said"),
    [
        ("projector", ("scenes", "embed"), "`scenes.seed` and `data.split_seed`"),
        (
            "qlora",
            ("scenes", "pretrain", "projector"),
            "`scenes.seed`, `pretrain.seed`, `projector.seed` and `data.spli",
        ),
        ("pretrain", ("tokens",), "`corpus.split_seed`."),
    ],
)
def test_what_was_drawn_once_for_all_is_named(stage, upstream, said):
    declaration = {
        "preset": "tiny", "stage": stage, "metric": "test/loss", "tokens": 10, "seeds": 2,
        "seed_settings": [f"{stage}.seed"], "levels": {"a": 1, "b": 2},
    }  # fmt: skip
    tags = {f"mmphi.upstream.{name}": "a run" for name in upstream}
    trial = Trial("run", "verdict", "a", 0, "FINISHED", tags=tags)
    assert f"**Not varied**, so not part of the uncertainty: {said}" in design(
        StudyData("study", "run", "1", declaration, trials=[trial])
    )


def test_a_report_of_a_study_that_runs_says_so(empty_store: str, tmp_path: Path) -> None:
    TrackingStore().client.update_run(record("half", seeds=8, looks=[4]), status="RUNNING")
    for level, by in (("2 layers", 0.0), ("3 layers", -0.1)):
        for seed in range(3):
            trial("half", level, seed, {"test/loss": 1.0 + seed / 100 + by + seed * by / 50})
    text = write("half", tmp_path / "three")
    assert "> **Partial report: 6 of 24 trials have ended.**" in text
    assert "**No verdict yet: the study has not reached the number of seeds at which it is judged.**" in text
    assert "**No verdict on 3 layers yet** before 4 seeds: so far −0.102 nats/token from 2 layers" in text
    assert "every level at" not in text
    assert "levels at 0 to 3 paired seeds" in text


def test_seeds_that_were_lowered_below_the_first_look_are_the_reason_for_no_verdict(
    empty_store: str, tmp_path: Path
) -> None:
    run_id = record("less", seeds=8, levels={"2 layers": 2, "3 layers": 3})
    change = '{"what": "seeds", "name": "", "value": 3, "at": "2026-11-25 01:00:00"}'
    TrackingStore().client.set_tag(run_id, "mmphi.change.0000", change)
    for level, by in (("2 layers", 0.0), ("3 layers", -0.1)):
        for seed in range(3):
            trial("less", level, seed, {"test/loss": 1.0 + seed / 100 + by})
    text = write("less", tmp_path)
    assert "No verdict yet" in text
    assert "The seeds were lowered to 3 while it ran, and it is judged at 8: there is no verdict." in text
    assert "`mmphi studies less --seeds 8` raises them" in text


def test_seeds_beyond_the_declared_ones_are_exploratory(empty_store: str, tmp_path: Path) -> None:
    run_id = record("more", seeds=3, levels={"2 layers": 2, "3 layers": 3}, also={"test/exact_match": "exact answers"})
    change = '{"what": "seeds", "name": "", "value": 8, "at": "2026-11-25 01:00:00"}'
    TrackingStore().client.set_tag(run_id, "mmphi.change.0000", change)
    for level, by in (("2 layers", 0.0), ("3 layers", -0.1)):
        for seed in range(8):
            metrics = {"test/loss": 1.0 + seed / 100 + by + seed * by / 50, "test/exact_match": 0.5 - by}
            trial("more", level, seed, metrics)
    text = write("more", tmp_path)
    assert "**No difference can be shown between 3 layers and 2 layers** with 3 seeds" in text
    assert "The study declared 3 seeds, and more were added after results were seen." in text
    assert "| 3 layers | 8 | −0.107 |" in text
    assert "| 3 layers | 0.6 (0.6 to 0.6) |" in text
    assert "Partial report" not in text


def test_what_diverged_is_counted_and_left_out(empty_store: str, tmp_path: Path) -> None:
    record("wild", seeds=8, levels={"2 layers": 2, "3 layers": 3})
    found = values({"2 layers": 0.0, "3 layers": -0.1})
    found["3 layers"][5] = 7.5
    for level, of in found.items():
        for seed, value in of.items():
            trial("wild", level, seed, {"test/loss": value})
    text = write("wild", tmp_path)
    assert "**3 layers beat 2 layers by 0.096 nats/token**" in text
    assert "7 seeds). Left out, because they diverged or gave no number: 1 runs of 3 layers and 0 of 2 layers" in text
    assert re.search(r"\[7.5\]\(.*\) diverged \|", text)
    assert re.search(r"\| 3 layers \| 7 \| −0\.096 \| −0\.09\S* \| −0\.09\S* to −0\.09\S* \| 1 and 0 \| 1.00 \|", text)


def test_the_nuisance_values_that_were_used_are_shown(empty_store: str, tmp_path: Path) -> None:
    """Not those with the best mean: a value that failed at a seed is not taken."""
    record("rates", seeds=2, nuisance={"projector.learning_rate": [0.001, 0.01]}, levels={"2 layers": 2, "3 layers": 3})
    for level in ("2 layers", "3 layers"):
        for rate, losses in ((0.001, (0.5, 0.6)), (0.01, (0.1,))):
            for seed, loss in enumerate(losses, 1000):
                params = {"projector.learning_rate": rate}
                trial("rates", level, seed, {"val/loss": loss}, phase="tuning", params=params)
        for seed in range(2):
            trial("rates", level, seed, {"test/loss": 0.5 + seed}, params={"projector.learning_rate": 0.001})
    text = write("rates", tmp_path)
    assert "| 2 layers | 0.001 | 0.001: 0.55 (0.5 to 0.6); 0.01: 0.1 |" in text
    assert "3 layers, `projector.learning_rate`: only two values were tried" in text


def test_the_best_level_is_the_one_with_the_best_paired_difference() -> None:
    """Not with the best mean: one that lacks the hard seeds has a good mean."""
    hard = {n: 1.0 + n for n in range(10)}
    levels = {
        "base": hard,
        "better": {n: v - 0.5 - n / 100 for n, v in hard.items()},
        "lacks hard ones": {n: v - 0.2 - n / 100 for n, v in hard.items() if n < 8},
    }
    said = headline(compare(levels, "base"), "base", JudgedMetric("test/loss", "nats/token", less=True))
    assert said.startswith("**better beat base by 0.5")


def test_a_validation_metric_is_called_one(empty_store: str, tmp_path: Path) -> None:
    record("val", seeds=2, metric="val/loss", levels={"2 layers": 2, "3 layers": 3})
    for level in ("2 layers", "3 layers"):
        for seed in range(2):
            trial("val", level, seed, {"val/loss": 0.5 + seed})
    text = write("val", tmp_path)
    assert "judged by `val/loss` on the validation split." in text
    assert "neither training nor tuning" not in text


@pytest.mark.parametrize(("status", "judged"), [("FINISHED", True), ("RUNNING", False)])
def test_a_cell_that_never_ended_stops_no_verdict_of_a_study_that_has(
    empty_store: str, tmp_path: Path, status: str, judged: bool
) -> None:
    """A worker that is killed too often leaves its run KILLED, or RUNNING."""
    run_id = record("dead", seeds=8, levels={"2 layers": 2, "3 layers": 3})
    TrackingStore().client.update_run(run_id, status=status)
    for level, of in values({"2 layers": 0.0, "3 layers": -0.1}).items():
        for seed, value in of.items():
            if (level, seed) != ("2 layers", 6):
                trial("dead", level, seed, {"test/loss": value})
    trial("dead", "2 layers", 6, {}, status="KILLED")
    text = write("dead", tmp_path)
    assert ("**3 layers beat 2 layers by" in text) == judged
    assert ("No verdict yet" in text) != judged


def test_a_run_that_failed_for_another_reason_is_not_lost_while_the_study_runs(empty_store: str) -> None:
    run_id = record("disk", seeds=2, levels={"2 layers": 2, "3 layers": 3})
    TrackingStore().client.update_run(run_id, status="RUNNING")
    for name, reason in (("2 layers", "StoreError: the disk is full"), ("3 layers", "TrainingError: the loss is nan")):
        trial("disk", name, 0, {}, status="FAILED", tags={"mmphi.error": reason})
    assert load_study(TrackingStore(), "disk").lost() == {"2 layers": set(), "3 layers": {0}}


def test_costs_within_their_noise_and_curves_of_two_points_are_not_drawn(empty_store: str, tmp_path: Path) -> None:
    levels = {"2 layers": 2, "3 layers": 3}
    record("noisy", seeds=4, levels=levels)
    for level in levels:
        for seed in range(4):
            latency = {"cost/first_token_s": 0.1 + 0.02 * seed + 0.001 * levels[level]}
            metrics = {"test/loss": 0.5 + 0.01 * seed, "projector/parameters": 1e5 * levels[level], **latency}
            trial("noisy", level, seed, metrics, curve={50: 1.0, 100: 0.5})
    text = write("noisy", tmp_path)
    assert "curves.png" not in text
    assert "tradeoffs.png" in text  # By the parameters alone.
    assert re.search(r"less than twice their spread over seeds: [^.]*first token", text)


def test_names_of_several_words_are_quoted() -> None:
    assert quote_name("better than none") == "“better than none”"
    assert quote_name("2 layers") == "2 layers"
